// The module that `import fastroute._C` finds. Loading the library is what registers the ops; beside them there is
// what looks at Python's own objects. Where Python's headers are missing, torch.ops.load_library still loads the ops.
#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Of DLPack 1, whose ABI is fixed: a tensor, and the functions that a library gives to others in a capsule.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void (*allocate)(), (*from_python)(), (*to_python)();
  int (*form_of)(void* python, DLTensor* out);  // keeps no reference; may be null
  void (*stream)();
};

using Word = uintptr_t;

Word address(const void* p) {
  return reinterpret_cast<Word>(p);
}

// An element of a list; one further on is fetched meanwhile, as a training step leaves none of them in the cache.
PyObject* element(PyObject* list, Py_ssize_t i, Py_ssize_t size) {
  constexpr Py_ssize_t ahead = 16;
  if (i + ahead < size) {
    __builtin_prefetch(PyList_GetItem(list, i + ahead));
  }
  return PyList_GetItem(list, i);
}

// Where CPython up to 3.12 has a number that any change of a dict gives another value, unique among all dicts. Elsewhere
// it is something else, inside the object all the same: reading.py tries it before it relies on it.
Word version_of(PyObject* dict) {
  constexpr size_t words_before = 3;  // reference count, type, number of items
  uint64_t version = 0;
  std::memcpy(&version, reinterpret_cast<const char*>(dict) + words_before * sizeof(void*), sizeof version);
  return static_cast<Word>(version);
}

// The addresses of a dict's keys and values. `put` takes words, and says whether to go on.
template <typename Put>
bool put_items(const Put& put, PyObject* dict) {
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
    if (!put(address(key)) || !put(address(value))) {
      return false;
    }
  }
  return true;
}

// Class, shape, dtype and device of each value of a dict of tensors and None, and its key; not of other values.
template <typename Put>
bool put_forms(const Put& put, PyObject* dict, PyObject* kinds, const DLPackExchangeAPI& api) {
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
    PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (!put(address(key)) || !put(address(kind))) {
      return false;
    }
    if (kind == PyTuple_GetItem(kinds, 0)) {
      continue;
    }
    bool is_known = false;
    for (Py_ssize_t k = 1; k < PyTuple_Size(kinds) && !is_known; ++k) {
      is_known = kind == PyTuple_GetItem(kinds, k);
    }
    DLTensor t;
    if (!is_known || api.form_of(value, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto dtype = static_cast<Word>(t.code) << 24 | static_cast<Word>(t.bits) << 16 | t.lanes;
    const auto device = static_cast<Word>(t.device_type) << 16 ^ static_cast<Word>(t.device_id);
    if (!put(dtype) || !put(device) || !put(static_cast<Word>(t.ndim))) {
      return false;
    }
    for (int32_t i = 0; i < t.ndim; ++i) {
      if (!put(static_cast<Word>(t.shape[i]))) {
        return false;
      }
    }
  }
  return true;
}

// Modules: lists of `objects`, of whom the class counts, of `dicts`, and of dicts `owners` of tensors.
struct Modules {
  PyObject *objects, *dicts, *owners, *kinds, *exchange;
  int by_version;  // whether a dict's version tells that it is the same

  template <typename Put>
  bool walk(const Put& put) const {
    const auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange, "dlpack_exchange_api"));
    if (!PyList_Check(objects) || !PyList_Check(dicts) || !PyList_Check(owners) || !PyTuple_Check(kinds) ||
        PyTuple_Size(kinds) < 1 || api == nullptr || api->major != 1 || api->form_of == nullptr) {
      PyErr_Clear();
      return false;
    }
    for (Py_ssize_t i = 0, count = PyList_Size(objects); i < count; ++i) {
      if (!put(address(Py_TYPE(element(objects, i, count))))) {
        return false;
      }
    }
    for (PyObject* list : {dicts, owners}) {
      for (Py_ssize_t i = 0, count = PyList_Size(list); i < count; ++i) {
        PyObject* dict = element(list, i, count);
        const Py_ssize_t size = PyDict_Check(dict) ? PyDict_Size(dict) : -1;
        if (size < 0 || !put(static_cast<Word>(size))) {
          return false;
        }
        if (list == dicts && by_version != 0) {
          if (!put(version_of(dict))) {
            return false;
          }
        } else if (size > 0 && !(list == dicts ? put_items(put, dict) : put_forms(put, dict, kinds, *api))) {
          return false;
        }
      }
    }
    return true;
  }
};

// Whether two lists have the same elements.
bool are_same(PyObject* a, PyObject* b) {
  const Py_ssize_t size = PyList_Check(a) && PyList_Check(b) ? PyList_Size(a) : -1;
  bool same = size >= 0 && PyList_Size(b) == size;
  for (Py_ssize_t i = 0; same && i < size; ++i) {
    same = PyList_GetItem(a, i) == PyList_GetItem(b, i);
  }
  return same;
}

// Whether classes have what they had: a list of tuples (class, name, what it had of that name).
bool have_attributes(PyObject* looks) {
  bool same = PyList_Check(looks);
  for (Py_ssize_t i = 0; same && i < PyList_Size(looks); ++i) {
    PyObject* look = PyList_GetItem(looks, i);
    same = PyTuple_Check(look) && PyTuple_Size(look) == 3;
    PyObject* found = same ? PyObject_GetAttr(PyTuple_GetItem(look, 0), PyTuple_GetItem(look, 1)) : nullptr;
    same = found != nullptr && found == PyTuple_GetItem(look, 2);
    if (found == nullptr) {
      PyErr_Clear();
    } else {
      Py_DecRef(found);
    }
  }
  return same;
}

// is_same(fingerprint, given, known, looks, objects, dicts, owners, kinds, exchange, by_version) -> bool
//
// Also whether the lists `given` and `known` have the same elements, and classes what `looks` says they had.
PyObject* is_same(PyObject*, PyObject* args) {
  Modules m;
  const char* bytes = nullptr;
  Py_ssize_t size = 0;
  PyObject *given = nullptr, *known = nullptr, *looks = nullptr;
  if (!PyArg_ParseTuple(args, "y#OOOOOOOOp", &bytes, &size, &given, &known, &looks, &m.objects, &m.dicts, &m.owners,
                        &m.kinds, &m.exchange, &m.by_version)) {
    return nullptr;
  }
  if (!are_same(given, known) || !have_attributes(looks)) {
    return PyBool_FromLong(0);
  }
  const auto* at = reinterpret_cast<const Word*>(bytes);
  const Word* const end = at + size / sizeof(Word);
  const bool same = m.walk([&](Word word) { return at != end && *at++ == word; });
  return PyBool_FromLong(same && at == end);
}

// fingerprint(objects, dicts, owners, kinds, exchange, by_version) -> bytes
//
// As long as nobody lets go of what it was made of, another one is the same only if nothing has changed. Empty where that
// cannot be told: a value in `owners` is of none of the classes `kinds`, of which the first is None's, or on a device
// that `exchange`, the capsule of torch.Tensor, does not know. (No symbol of Python's data is used: a process without
// Python could not load the ops.)
PyObject* fingerprint(PyObject*, PyObject* args) {
  Modules m;
  if (!PyArg_ParseTuple(args, "OOOOOp", &m.objects, &m.dicts, &m.owners, &m.kinds, &m.exchange, &m.by_version)) {
    return nullptr;
  }
  std::vector<Word> words;
  const auto put = [&](Word word) {
    words.push_back(word);
    return true;
  };
  if (!m.walk(put)) {
    words.clear();
  }
  return PyBytes_FromStringAndSize(
      reinterpret_cast<const char*>(words.data()), static_cast<Py_ssize_t>(words.size() * sizeof(Word)));
}

// version(dict) -> int
PyObject* version(PyObject*, PyObject* dict) {
  return PyLong_FromUnsignedLongLong(PyDict_Check(dict) ? version_of(dict) : 0);
}

PyMethodDef methods[] = {
    {"fingerprint", fingerprint, METH_VARARGS, "Of modules; see fastroute/modules/reading.py."},
    {"version", version, METH_O, "Of a dict, where Python has one."},
    {"is_same", is_same, METH_VARARGS, "Whether modules have this fingerprint."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "fastroute's C++ and CUDA kernels", 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  return PyModuleDef_Init(&definition);
}
#endif
