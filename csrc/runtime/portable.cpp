// What newer headers of libstdc++ call in libraries younger than those this module is to run on (glibc 2.28, GCC 8's
// libstdc++), defined here instead. portable.cmake does the same for glibc; the version script keeps all of it inside.
#include <exception>
#include <new>

#if defined(__linux__) && defined(__GLIBCXX__)

// glibc 2.32: shared_ptr asks whether it may count without atomics. Threads run beside every kernel: never.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// Out of line and exported since GCC 4.4. Versioned, so that they are the library's and no copy that this module
// inlined.
void fastrobust_copy_exception(void* to, const void* from);
void fastrobust_drop_exception(void* pointer);
}
__asm__(".symver fastrobust_copy_exception, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver fastrobust_drop_exception, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");

namespace std {

// GLIBCXX_3.4.29: new T[n] with too large an n, and vectors that grow too long, end here.
[[noreturn]] void __throw_bad_array_new_length();
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }

namespace __exception_ptr {

// CXXABI_1.3.13: the inline parts of exception_ptr count references through these two. A copy that is never destroyed
// counts one up, the destructor one down.
void exception_ptr::_M_addref() noexcept {
  void* copy;
  fastrobust_copy_exception(&copy, this);
}
void exception_ptr::_M_release() noexcept { fastrobust_drop_exception(this); }

}  // namespace __exception_ptr
}  // namespace std

#endif
