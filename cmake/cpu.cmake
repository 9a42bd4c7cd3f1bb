# _core: csrc/cpu/*.cpp once with baseline flags; csrc/cpu/kernels/*.cpp once per instruction set,
# with XATTN_ISA naming it. The module picks among them when it is loaded.
include(CheckCXXSourceCompiles)

file(GLOB XATTN_CPU_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/*.cpp)
file(GLOB XATTN_KERNEL_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/kernels/*.cpp)

# Listed from the weakest to the strongest, which is also the link order; see below.
set(XATTN_ISAS portable)
set(XATTN_FLAGS_portable "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  set(XATTN_AVX2 -mavx2 -mfma -mf16c)
  set(XATTN_AVX512 ${XATTN_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                   -mprefer-vector-width=512)
  set(XATTN_FLAGS_avx2 ${XATTN_AVX2})
  set(XATTN_FLAGS_avx512 ${XATTN_AVX512})
  set(XATTN_FLAGS_avx512_bf16 ${XATTN_AVX512} -mavx512bf16)
  foreach(isa avx2 avx512 avx512_bf16)
    string(REPLACE ";" " " flags "${XATTN_FLAGS_${isa}}")
    set(CMAKE_REQUIRED_FLAGS "${flags}")
    check_cxx_source_compiles("int main() { return 0; }" XATTN_COMPILER_HAS_${isa})
    unset(CMAKE_REQUIRED_FLAGS)
    if(XATTN_COMPILER_HAS_${isa})
      list(APPEND XATTN_ISAS ${isa})
    else()
      message(WARNING "The compiler does not know '${flags}': no ${isa} kernels are built")
    endif()
  endforeach()
endif()

add_library(xattn_cpu OBJECT csrc/bindings_cpu.cpp csrc/edges.cpp ${XATTN_CPU_SOURCES})
target_link_libraries(xattn_cpu PRIVATE xattn_flags pybind11::module)
set_source_files_properties(
  csrc/bindings_cpu.cpp PROPERTIES COMPILE_DEFINITIONS XATTN_VERSION="${XATTN_VERSION}")

# Inline functions of the standard library are compiled into the objects of every instruction set
# under one name, and the linker keeps the first copy it meets. Objects therefore go from baseline
# upwards: a copy built for AVX-512 must never serve code that runs without it.
set(XATTN_OBJECTS $<TARGET_OBJECTS:xattn_cpu>)
foreach(isa ${XATTN_ISAS})
  string(TOUPPER ${isa} upper)
  target_compile_definitions(xattn_cpu PRIVATE XATTN_HAVE_${upper}=1)
  add_library(xattn_cpu_${isa} OBJECT ${XATTN_KERNEL_SOURCES})
  target_link_libraries(xattn_cpu_${isa} PRIVATE xattn_flags)
  # GCC would make a second copy of a product's inner loop for unit strides, and spill registers in both.
  target_compile_options(xattn_cpu_${isa} PRIVATE ${XATTN_FLAGS_${isa}}
                         $<$<CXX_COMPILER_ID:GNU>:-fno-version-loops-for-strides>)
  target_compile_definitions(xattn_cpu_${isa} PRIVATE XATTN_ISA=${isa})
  list(APPEND XATTN_OBJECTS $<TARGET_OBJECTS:xattn_cpu_${isa}>)
endforeach()
pybind11_add_module(_core MODULE NO_EXTRAS ${XATTN_OBJECTS})
target_link_libraries(_core PRIVATE xattn_flags)
xattn_finish_module(_core)

# What was built, for `python -m xattn_kernels info`.
list(JOIN XATTN_ISAS " " XATTN_ISAS_TEXT)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/cpu.txt
     "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\n${XATTN_ISAS_TEXT}\n")
