/* A CUDA driver that does nothing, counts launches, and says that there is one H100.
 *
 * It is preloaded as libcuda.so.1. The functions of the CUDA runtime that torch calls on the way to a launch are here
 * too, since the real runtime asks a real driver. Device memory is addresses that nobody reads. What is not here fails
 * in the real runtime, for there is no driver.
 */
#include <dlfcn.h>
#include <stddef.h>

typedef unsigned long long address;

unsigned long long launches = 0;

#define NOTHING(name) int name() { return 0; }
#define LAUNCH(name) int name() { ++launches; return 0; }
#define HANDLE(name) int name(void **handle) { *handle = (void *)64; return 0; }

/* The driver, as torch's static launcher and Triton call it. */

LAUNCH(cuLaunchKernel)
LAUNCH(cuLaunchKernelEx)
LAUNCH(cuLaunchCooperativeKernel)
LAUNCH(cudaLaunchKernel) /* kernels of torch */
LAUNCH(cudaLaunchKernelExC)
HANDLE(cuCtxGetCurrent)
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuModuleLoad)
HANDLE(cuModuleLoadData)
HANDLE(cuModuleLoadDataEx)
HANDLE(cuModuleGetFunction)
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorString)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)

int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuPointerGetAttribute(void *value, int attribute, address pointer) { *(address *)value = pointer; return 0; }

int cuPointerGetAttributes(unsigned count, int *attributes, void **values, address pointer) {
  *(address *)values[0] = pointer;
  return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block at most, registers */
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { /* CUdevice_attribute */
    case 8: *value = 48 << 10; break;   /* shared memory of a block */
    case 10: *value = 32; break;        /* warp size */
    case 16: *value = 132; break;       /* multiprocessors */
    case 75: *value = 9; break;         /* compute capability */
    case 76: *value = 0; break;
    case 81: *value = 228 << 10; break; /* shared memory of a multiprocessor */
    case 97: *value = 227 << 10; break; /* shared memory of a block that asks for it */
    default: *value = 1;
  }
  return 0;
}

/* The runtime, as torch calls it: one device, one stream, no capture. */

HANDLE(cudaEventCreateWithFlags)
HANDLE(cudaStreamCreateWithPriority)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaEventDestroy)
NOTHING(cudaEventQuery)
NOTHING(cudaEventRecord)
NOTHING(cudaEventSynchronize)
NOTHING(cudaFree)
NOTHING(cudaGetDeviceProperties) /* their layout depends on the version; `host_run` has them */
NOTHING(cudaGetDeviceProperties_v2)
NOTHING(cudaGetLastError)
NOTHING(cudaMemcpyAsync)
NOTHING(cudaMemsetAsync)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaSetDevice)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaThreadExchangeStreamCaptureMode)

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { return cuDeviceGetAttribute(value, attribute, device); }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}

int cudaMemGetInfo(size_t *free, size_t *total) {
  *free = *total = 80ull << 30;
  return 0;
}

int cudaMalloc(void **pointer, size_t bytes) {
  static char *next = (char *)(1ull << 40);
  *pointer = next;
  next += (bytes + 511) & ~511ull;
  return 0;
}

static int nothing() { return 0; }

int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, address flags, int *status) {
  void *known = dlsym(RTLD_DEFAULT, name);
  *found = known ? known : (void *)nothing;
  if (status) *status = 0;
  return 0;
}
