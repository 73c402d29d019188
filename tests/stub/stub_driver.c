// A CUDA driver that runs nothing: it lends handles, and writes down every launch.
#include <pthread.h>
#include <string.h>

#include "cuda.h"

#define PARAMETERS 32
#define LAUNCHES 65536
#define FUNCTIONS 1024

typedef struct {
  unsigned long long function, stream;
  unsigned grid[3], block, shared, attributes[4], attribute_count, parameter_count;
  unsigned long long parameters[PARAMETERS];
} Launch;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static unsigned functions, sizes[FUNCTIONS][PARAMETERS], counts[FUNCTIONS];

Launch stub_launches[LAUNCHES];
unsigned stub_launched;

// The sizes in bytes of a function's parameters: a driver reads them from the binary, this one is told.
void stub_parameters(unsigned long long function, unsigned count, const unsigned *bytes) {
  counts[function] = count;
  memcpy(sizes[function], bytes, count * sizeof(unsigned));
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  pthread_mutex_lock(&mutex);
  Launch *launch = &stub_launches[stub_launched++ % LAUNCHES];
  memset(launch, 0, sizeof(Launch));
  launch->function = (unsigned long long)f;
  launch->stream = (unsigned long long)config->hStream;
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->block = config->blockDimX;
  launch->shared = config->sharedMemBytes;
  launch->attribute_count = config->numAttrs;
  for (unsigned i = 0; i < config->numAttrs; i++) launch->attributes[i] = config->attrs[i].id;
  launch->parameter_count = counts[launch->function];
  for (unsigned i = 0; i < launch->parameter_count; i++)
    memcpy(&launch->parameters[i], parameters[i], sizes[launch->function][i]);
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)(unsigned long long)++functions;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 << 10 : 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **string) { *string = "stub"; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
