/* A CUDA driver that does nothing, counts launches, and reports one H100.
 *
 * It is preloaded as libcuda.so.1. It also holds the functions of the CUDA runtime that torch calls on the way to a
 * launch: the real runtime needs a real driver. Device memory is addresses that nothing reads. A function that is not
 * here fails in the real runtime.
 */
#include <dlfcn.h>
#include <stddef.h>

typedef unsigned long long address;

unsigned long long launches = 0;

#define NOTHING(name) int name() { return 0; }
#define LAUNCH(name) int name() { ++launches; return 0; }
#define HANDLE(name) int name(void **handle) { *handle = (void *)64; return 0; }
#define REPORT(name, value) int name(int *found) { *found = value; return 0; }

/* The driver, as torch's static launcher and Triton call it. */
LAUNCH(cuLaunchKernel) LAUNCH(cuLaunchKernelEx) LAUNCH(cuLaunchCooperativeKernel)
HANDLE(cuCtxGetCurrent) HANDLE(cuDevicePrimaryCtxRetain) HANDLE(cuModuleGetFunction)
HANDLE(cuModuleLoad) HANDLE(cuModuleLoadData) HANDLE(cuModuleLoadDataEx)
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorString) NOTHING(cuInit) NOTHING(cuModuleUnload)
NOTHING(cuLinkAddData_v2) NOTHING(cuLinkComplete) NOTHING(cuLinkCreate_v2)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuTensorMapEncodeTiled)
REPORT(cuCtxGetDevice, 0) REPORT(cuDeviceGet, 0) REPORT(cuDeviceGetCount, 1) REPORT(cuDriverGetVersion, 13000)

int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuPointerGetAttribute(address *value, int attribute, address pointer) { *value = pointer; return 0; }

int cuPointerGetAttributes(unsigned count, int *attributes, address **values, address pointer) {
  *values[0] = pointer;
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
  static const int figures[] = { /* by CUdevice_attribute; 0 is one that is reported as 1 */
    [8] = 48 << 10,                                /* shared memory of a block */
    [10] = 32, [16] = 132, [75] = 9,               /* warp size, multiprocessors, major compute capability */
    [81] = 228 << 10, [97] = 227 << 10,            /* shared memory of a multiprocessor, and of a block, opted in */
  };
  int known = attribute < sizeof(figures) / sizeof(int) ? figures[attribute] : 0;
  *value = attribute == 76 ? 0 : known ? known : 1; /* 76: minor compute capability */
  return 0;
}

/* The runtime, as torch calls it: one device, one stream, no capture. cudaGetDeviceProperties is in `host.py`, as its
 * layout depends on the version. */
LAUNCH(cudaLaunchKernel) LAUNCH(cudaLaunchKernelExC)
HANDLE(cudaEventCreateWithFlags) HANDLE(cudaStreamCreateWithPriority)
NOTHING(cudaDeviceSynchronize) NOTHING(cudaEventDestroy) NOTHING(cudaEventQuery) NOTHING(cudaEventRecord)
NOTHING(cudaEventSynchronize) NOTHING(cudaFree) NOTHING(cudaGetDeviceProperties) NOTHING(cudaGetDeviceProperties_v2)
NOTHING(cudaGetLastError) NOTHING(cudaMemcpyAsync) NOTHING(cudaMemsetAsync) NOTHING(cudaPeekAtLastError)
NOTHING(cudaSetDevice) NOTHING(cudaStreamSynchronize) NOTHING(cudaThreadExchangeStreamCaptureMode)
REPORT(cudaDeviceCanAccessPeer, 0) REPORT(cudaDriverGetVersion, 13000) REPORT(cudaGetDevice, 0)
REPORT(cudaGetDeviceCount, 1)

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
