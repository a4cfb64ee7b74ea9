// What a recent compiler takes from libraries that are newer than torch's wheels ask for (manylinux_2_28: glibc 2.28,
// GLIBCXX_3.4.24). It is defined here, so that a wheel that was built on a newer Linux runs where torch's wheels run.
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// GLIBCXX_3.4.26 and 3.4.29: members of the standard streams, made of their templates.
template std::basic_stringbuf<char>::basic_stringbuf();
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
#if _GLIBCXX_RELEASE >= 11
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;

namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif

extern "C" {
// glibc 2.32. With 0, shared pointers count atomically, as they did before there was such a name.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// glibc 2.29 has new versions of exp and log that set no errno; values are the same. setup.py links with --wrap.
#if defined(__x86_64__) || defined(__aarch64__)
double fastroute_exp(double);
double fastroute_log(double);
#if defined(__x86_64__)
__asm__(".symver fastroute_exp, exp@GLIBC_2.2.5\n.symver fastroute_log, log@GLIBC_2.2.5");
#else
__asm__(".symver fastroute_exp, exp@GLIBC_2.17\n.symver fastroute_log, log@GLIBC_2.17");
#endif
double __wrap_exp(double x) { return fastroute_exp(x); }
double __wrap_log(double x) { return fastroute_log(x); }

// glibc 2.34 took dlsym, which headers of torch 2.14 call, from libdl. Older ones find it there: torch's libraries load it.
#if __GLIBC_PREREQ(2, 34)
void* fastroute_dlsym(void*, const char*);
#if defined(__x86_64__)
__asm__(".symver fastroute_dlsym, dlsym@GLIBC_2.2.5");
#else
__asm__(".symver fastroute_dlsym, dlsym@GLIBC_2.17");
#endif
__attribute__((visibility("hidden"))) void* dlsym(void* library, const char* name) {
  return fastroute_dlsym(library, name);
}
#endif
#endif
}

#endif
