/* A driver for machines without GPUs: as many H100 as STANDIN_GPUS says, named after STANDIN_NAME. For tests.
   What they tell is in the folder STANDIN_FOLDER: 0.energy is the counter of GPU 0 in mJ, 0.xid an error of it, told once. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, TIMEOUT = 10, XID_CRITICAL_ERROR = 8 };
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } event_t;

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

static char *path_of(unsigned index, const char *what) {
    static char path[4096];
    const char *folder = getenv("STANDIN_FOLDER");
    snprintf(path, sizeof path, "%s/%u.%s", folder ? folder : "/nonexistent", index, what);
    return path;
}

static int number_in(unsigned index, const char *what, unsigned long long *number) {
    FILE *file = fopen(path_of(index, what), "r");
    int found = file && fscanf(file, "%llu", number) == 1;
    if (file) fclose(file);
    return found;
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *mj) {
    return number_in((unsigned)(size_t)device - 1, "energy", mj) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetSupportedEventTypes(void *device, unsigned long long *types) {
    (void)device;
    *types = XID_CRITICAL_ERROR;
    return SUCCESS;
}

int nvmlEventSetCreate(void **set) { *set = (void *)1; return SUCCESS; }
int nvmlEventSetFree(void *set) { (void)set; return SUCCESS; }

int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    (void)device; (void)types; (void)set;
    return SUCCESS;
}

int nvmlEventSetWait_v2(void *set, event_t *event, unsigned timeout_ms) {
    (void)set; (void)timeout_ms;
    for (unsigned index = 0; index < count(); index++) {
        unsigned long long xid;
        if (!number_in(index, "xid", &xid)) continue;
        unlink(path_of(index, "xid"));
        memset(event, 0, sizeof *event);
        event->device = (void *)(size_t)(index + 1);
        event->type = XID_CRITICAL_ERROR;
        event->data = xid;
        return SUCCESS;
    }
    return TIMEOUT;
}
