# _cuda: csrc/cuda/*.cu. CMAKE_CUDA_ARCHITECTURES and CMAKE_CUDA_COMPILER come from the caller;
# build_backend/xattn_build/cuda.py has the rules. find_package(CUDAToolkit) is not used: it does
# not know the layout of the nvcc wheels.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  message(FATAL_ERROR "XATTN_CUDA needs CMAKE_CUDA_ARCHITECTURES, for example 80-real;90a-real;120")
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

set(XATTN_NVCC_FLAGS_FILE ${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvcc_flags.txt)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${XATTN_NVCC_FLAGS_FILE})
file(STRINGS ${XATTN_NVCC_FLAGS_FILE} XATTN_NVCC_FLAGS REGEX "^[^#]")

function(xattn_add_kernels target)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE xattn_flags)
  target_compile_options(${target} PRIVATE ${XATTN_NVCC_FLAGS})
endfunction()

file(GLOB XATTN_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu)
# Instructions of 90a exist in no other architecture, and *_sm90.cu use them: compiled for 90a alone.
# Without 90a in the list they are compiled as well, and every body is empty: XATTN_HAVE_SM90A tells the host.
set(XATTN_SM90_SOURCES ${XATTN_CUDA_SOURCES})
list(FILTER XATTN_SM90_SOURCES INCLUDE REGEX "_sm90\\.cu$")
list(FILTER XATTN_CUDA_SOURCES EXCLUDE REGEX "_sm90\\.cu$")
set(XATTN_SM90_ARCHS ${CMAKE_CUDA_ARCHITECTURES})
list(FILTER XATTN_SM90_ARCHS INCLUDE REGEX "^90a")

xattn_add_kernels(xattn_cuda ${XATTN_CUDA_SOURCES})
set(XATTN_CUDA_OBJECTS $<TARGET_OBJECTS:xattn_cuda>)
if(XATTN_SM90_ARCHS)
  target_compile_definitions(xattn_cuda PRIVATE XATTN_HAVE_SM90A=1)
endif()
if(XATTN_SM90_SOURCES)
  xattn_add_kernels(xattn_cuda_sm90 ${XATTN_SM90_SOURCES})
  if(XATTN_SM90_ARCHS)
    target_compile_definitions(xattn_cuda_sm90 PRIVATE XATTN_HAVE_SM90A=1)
    set_target_properties(xattn_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES "${XATTN_SM90_ARCHS}")
  endif()
  list(APPEND XATTN_CUDA_OBJECTS $<TARGET_OBJECTS:xattn_cuda_sm90>)
endif()

pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/bindings_cuda.cpp csrc/edges.cpp)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " XATTN_CUDA_ARCHS_TEXT)
target_compile_definitions(
  _cuda PRIVATE XATTN_CUDA_ARCHS="${XATTN_CUDA_ARCHS_TEXT}" XATTN_VERSION="${XATTN_VERSION}")
target_include_directories(_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_sources(_cuda PRIVATE ${XATTN_CUDA_OBJECTS})
target_link_libraries(_cuda PRIVATE xattn_flags)
xattn_finish_module(_cuda)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/cuda.txt "${CMAKE_CUDA_COMPILER_VERSION}\n")
