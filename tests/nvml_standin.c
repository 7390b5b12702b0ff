/* A driver for machines without GPUs: as many H100 as STANDIN_GPUS says, named after STANDIN_NAME. For tests. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2 };
typedef struct { unsigned long long total, free, used; } memory_t;

static unsigned count(void) {
    const char *given = getenv("STANDIN_GPUS");
    return given ? (unsigned)atoi(given) : 0;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code ? "the stand-in does not know" : "success"; }
int nvmlDeviceGetCount_v2(unsigned *found) { *found = count(); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(size_t)(index + 1);
    return index < count() ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned size) {
    const char *name = getenv("STANDIN_NAME");
    snprintf(text, size, "GPU-%s-%zu", name ? name : "standin", (size_t)device - 1);
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *text, unsigned size) {
    (void)device;
    snprintf(text, size, "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    (void)device;
    memset(memory, 0, sizeof *memory);
    memory->total = 81559ull << 20;
    memory->free = memory->total;
    return SUCCESS;
}
