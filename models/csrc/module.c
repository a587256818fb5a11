/* The module `models._kernels`: what models/kernels.py, few_rows.py, stack.py and blockwise.py call. */

#include "kernels.h"

#define INTERFACE 4 /* of the functions below: kernels.py asks for the same */

#ifdef HAS_KERNELS

#include <dlfcn.h>

/* Two threads' worth: of less each, one has read the other's half before that has woken. Not as many times that as there are
 * threads: 64 would leave 8 MiB to one, which takes it far longer than all take to wake. */
#define SHARED_BYTES (256 << 10)

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

void in_threads(void (*work)(void *), void *data, Py_ssize_t threads)
{
    if (threads > 1)
        parallel(work, data, (unsigned)threads, 0);
    else
        work(data);
}

Py_ssize_t threads_for(Py_ssize_t threads, Py_ssize_t parts, Py_ssize_t bytes)
{
    return parts < 2 || bytes < SHARED_BYTES ? 1 : threads;
}

int read_numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, Py_ssize_t *numbers)
{
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, not %zd", wanted, given);
        return 0;
    }
    for (Py_ssize_t index = 0; index < wanted; index++) {
        numbers[index] = PyLong_AsSsize_t(args[index]);
        if (numbers[index] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

#define METHOD(NAME, FUNCTION) {NAME, (PyCFunction)(void (*)(void))FUNCTION, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD("multiply", multiply_rows),
    METHOD("quantise", quantise_rows),
    METHOD("attend", attend),
    METHOD("attend_together", attend_together),
    METHOD("normalise", normalise),
    METHOD("gate", gate),
    METHOD("turn", turn),
    METHOD("mix", mix),
    METHOD("run_blocks", run_blocks),
    METHOD("shorten", shorten),
    METHOD("lengthen", lengthen),
    {NULL, NULL, 0, NULL},
};

static const char *supported(void)
{
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))dlsym(RTLD_DEFAULT, "GOMP_parallel");
    __builtin_cpu_init();
    if (!parallel || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return "";
    int bfloats = __builtin_cpu_supports("avx512bf16"), bytes = __builtin_cpu_supports("avx512vnni");
    return bfloats && bytes ? "float32 bfloat16 int8" : bytes ? "float32 int8" : bfloats ? "float32 bfloat16" : "float32";
}

#else

#define ROWS_MAX 0
static PyMethodDef methods[] = {{NULL, NULL, 0, NULL}};
static const char *supported(void) { return ""; }

#endif

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

/* INTERFACE: what the functions take. SUPPORTED: precisions, between spaces; none where torch's threads are not to be found. ROWS_MAX: of a product. */
PyMODINIT_FUNC PyInit__kernels(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0 ||
                   PyModule_AddStringConstant(module, "SUPPORTED", supported()) < 0 ||
                   PyModule_AddIntConstant(module, "ROWS_MAX", ROWS_MAX) < 0)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
