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

file(GLOB XATTN_CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu)
pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/bindings_cuda.cpp)
add_library(xattn_cuda OBJECT ${XATTN_CUDA_SOURCES})
target_link_libraries(xattn_cuda PRIVATE xattn_flags)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " XATTN_CUDA_ARCHS_TEXT)
target_compile_definitions(
  _cuda PRIVATE XATTN_CUDA_ARCHS="${XATTN_CUDA_ARCHS_TEXT}" XATTN_VERSION="${XATTN_VERSION}")
target_sources(_cuda PRIVATE $<TARGET_OBJECTS:xattn_cuda>)
target_link_libraries(_cuda PRIVATE xattn_flags)
xattn_finish_module(_cuda)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/cuda.txt "${CMAKE_CUDA_COMPILER_VERSION}\n")
