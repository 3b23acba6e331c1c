# A module linked on a new Linux runs on old ones, too (manylinux_2_28, as torch's own wheels): for functions whose
# version in glibc changed since, the linker sees libraries of the old names and versions first, that hold nothing else.
# At run time the system's own libraries of these names answer; each has kept its old versions. It reaches
# libcudart_static.a, too, which no header could.
set(old_libm exp exp2 log log2 pow)
set(old_libdl dlclose dlerror dlopen dlsym dlvsym)
set(old_librt shm_open shm_unlink)
set(old_libpthread
  pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join pthread_key_create
  pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy pthread_mutexattr_init
  pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
  pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock
  pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
  pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock
  pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)
set(old_file_libm libm.so.6)
set(old_file_libdl libdl.so.2)
set(old_file_librt librt.so.1)
set(old_file_libpthread libpthread.so.0)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(old_glibc GLIBC_2.17) # the first glibc of each processor
  list(APPEND old_libdl dlmopen)
else()
  set(old_glibc GLIBC_2.2.5)
  set(later_libdl dlmopen)
  set(later_version GLIBC_2.3.4)
endif()

# Links ``target`` against them, where the C library is a glibc on a processor whose first version is known.
function(fastrobust_link_old_glibc target)
  include(CheckCXXSymbolExists)
  check_cxx_symbol_exists(__GLIBC__ features.h FASTROBUST_GLIBC)
  if(NOT FASTROBUST_GLIBC OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|aarch64|arm64")
    return()
  endif()
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/old_glibc")
  set(files)
  foreach(library libm libdl librt libpthread)
    set(all_names ${old_${library}} ${later_${library}})
    list(TRANSFORM all_names REPLACE "(.+)" ".globl \\1\n.type \\1, %function\n\\1:\n" OUTPUT_VARIABLE text)
    list(JOIN text "" text)
    file(CONFIGURE OUTPUT "${folder}/${library}.s" CONTENT ".text\n${text}.section .note.GNU-stack,\"\",%progbits\n")
    list(JOIN old_${library} "; " names)
    set(map "${old_glibc} { ${names}; };\n")
    if(later_${library})
      string(APPEND map "${later_version} { ${later_${library}}; };\n")
    endif()
    file(CONFIGURE OUTPUT "${folder}/${library}.map" CONTENT "${map}")
    add_custom_command(OUTPUT "${folder}/${old_file_${library}}" DEPENDS "${folder}/${library}.s" "${folder}/${library}.map"
      COMMAND ${CMAKE_CXX_COMPILER} -shared -nostdlib -x assembler "${folder}/${library}.s" -o "${folder}/${old_file_${library}}"
        -Wl,-soname,${old_file_${library}} -Wl,--version-script=${folder}/${library}.map VERBATIM)
    list(APPEND files "${folder}/${old_file_${library}}")
  endforeach()
  add_custom_target(${target}_old_glibc DEPENDS ${files})
  add_dependencies(${target} ${target}_old_glibc)
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS "${files}")
  list(JOIN files "," files) # flags, not files: CMake would write -lm for some of these, and an rpath
  target_link_libraries(${target} PRIVATE "-Wl,--push-state,--as-needed,${files},--pop-state")
endfunction()
