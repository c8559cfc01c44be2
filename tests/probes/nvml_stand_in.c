/* A stand-in for NVIDIA's libnvidia-ml, compiled by test_device.py, so that the real Python binding runs without a GPU.
 *
 * It answers from environment variables, read at every call:
 *   STAND_IN_GPUS       how many GPUs there are (1)
 *   STAND_IN_INIT       what nvmlInitWithFlags returns (0)
 *   STAND_IN_MILLIWATTS power of GPU 0; GPU i draws i + 1 times as much (100000)
 *   STAND_IN_TICK_MS    how long a value of the energy counter stands (50)
 *   STAND_IN_REFUSES    a function that returns STAND_IN_CODE (3: not supported), on every GPU or only on STAND_IN_GPU
 *   STAND_IN_SLOW_MS    how long a reading of the power takes (0)
 *
 * The counter rises with the monotonic clock, which is Python's perf_counter_ns on Linux. Built with -DNO_ENERGY it lacks
 * the counter, as an old driver does.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { int index; } Gpu;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, MOST_GPUS = 8 };

static Gpu gpus[MOST_GPUS] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
static int opened, refusals;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

/* What the function is to return for a GPU before it does anything. */
static int answer(const char *function, int index) {
    const char *refused = getenv("STAND_IN_REFUSES");
    if (!refused || strcmp(refused, function) || number("STAND_IN_GPU", index) != index) return SUCCESS;
    refusals++;
    return (int)number("STAND_IN_CODE", NOT_SUPPORTED);
}

static void uuid_of(int index, char *text, unsigned int length) {
    snprintf(text, length, "GPU-00000000-0000-0000-0000-%012d", index);
}

int stand_in_opened(void) { return opened; }
int stand_in_refusals(void) { return refusals; }

int nvmlInitWithFlags(unsigned int flags) {
    int code = (int)number("STAND_IN_INIT", SUCCESS);
    (void)flags;
    if (code == SUCCESS) opened++;
    return code;
}

int nvmlShutdown(void) { opened--; return SUCCESS; }

const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *text, unsigned int length) { snprintf(text, length, "550.1"); return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned int *count) { *count = (unsigned int)number("STAND_IN_GPUS", 1); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Gpu **gpu) {
    if (index >= number("STAND_IN_GPUS", 1)) return INVALID_ARGUMENT;
    *gpu = &gpus[index];
    return answer("nvmlDeviceGetHandleByIndex_v2", (int)index);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **gpu) {
    char known[80];
    for (int index = 0; index < number("STAND_IN_GPUS", 1); index++) {
        uuid_of(index, known, sizeof known);
        if (!strcmp(known, uuid)) { *gpu = &gpus[index]; return SUCCESS; }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Gpu *gpu, char *text, unsigned int length) { uuid_of(gpu->index, text, length); return SUCCESS; }

int nvmlDeviceGetName(Gpu *gpu, char *text, unsigned int length) {
    snprintf(text, length, "Stand-in %d", gpu->index);
    return SUCCESS;
}

#ifndef NO_ENERGY
int nvmlDeviceGetTotalEnergyConsumption(Gpu *gpu, unsigned long long *millijoules) {
    struct timespec now;
    unsigned long long tick_ms = (unsigned long long)number("STAND_IN_TICK_MS", 50), ms;
    unsigned long long milliwatts = (unsigned long long)number("STAND_IN_MILLIWATTS", 100000) * (gpu->index + 1);
    clock_gettime(CLOCK_MONOTONIC, &now);
    ms = (unsigned long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    *millijoules = ms / tick_ms * tick_ms * milliwatts / 1000;
    return answer("nvmlDeviceGetTotalEnergyConsumption", gpu->index);
}
#endif

int nvmlDeviceGetPowerUsage(Gpu *gpu, unsigned int *milliwatts) {
    long slow_ms = number("STAND_IN_SLOW_MS", 0);
    struct timespec pause = {slow_ms / 1000, slow_ms % 1000 * 1000000};
    nanosleep(&pause, NULL);
    *milliwatts = (unsigned int)(number("STAND_IN_MILLIWATTS", 100000) * (gpu->index + 1));
    return answer("nvmlDeviceGetPowerUsage", gpu->index);
}

int nvmlDeviceGetMemoryInfo(Gpu *gpu, Memory *memory) {
    memory->total = 80ULL << 30;
    memory->used = (unsigned long long)(gpu->index + 1) << 30;
    memory->free = memory->total - memory->used;
    return answer("nvmlDeviceGetMemoryInfo", gpu->index);
}

int nvmlDeviceGetUtilizationRates(Gpu *gpu, Utilization *rates) {
    rates->gpu = 50 + gpu->index;
    rates->memory = 20 + gpu->index;
    return answer("nvmlDeviceGetUtilizationRates", gpu->index);
}

int nvmlDeviceGetClockInfo(Gpu *gpu, int clock, unsigned int *mhz) {
    enum { SM = 1, MEMORY = 2 };
    *mhz = clock == SM ? 1980 : clock == MEMORY ? 2619 : 0;
    return answer("nvmlDeviceGetClockInfo", gpu->index);
}
