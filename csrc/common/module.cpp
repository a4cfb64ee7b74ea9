// The module that `import fastroute._C` finds. It is empty: loading the library is what registers the ops.
// Where Python's headers are missing, torch.ops.load_library still loads it.
#if __has_include(<Python.h>)
#include <Python.h>

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "fastroute's C++ and CUDA kernels", 0, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  return PyModuleDef_Init(&definition);
}
#endif
