// The inner loops of the data scheduler: what it does for every sequence of every step.
//
// `data_scheduler.sequences` has the same functions in numpy; they are the definition, and what is used where this file
// was not compiled. All arguments are C-contiguous buffers of the dtype that is named; nothing here keeps a reference.
// Built against Python's stable ABI (3.11 and newer), without numpy's headers.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    Py_buffer view;
    Py_ssize_t length;  // elements
} Array;

// A one-dimensional look at `object`, of `itemsize` bytes an element (0: any). Returns 0, or -1 with an exception set.
static int open_array(PyObject *object, Array *array, Py_ssize_t itemsize, int flags, const char *name) {
    if (PyObject_GetBuffer(object, &array->view, PyBUF_C_CONTIGUOUS | flags) != 0) {
        return -1;
    }
    if (itemsize != 0 && array->view.itemsize != itemsize) {
        PyErr_Format(PyExc_TypeError, "%s: elements of %zd bytes, not %zd", name, array->view.itemsize, itemsize);
        PyBuffer_Release(&array->view);
        return -1;
    }
    array->length = array->view.itemsize ? array->view.len / array->view.itemsize : 0;
    return 0;
}

static void close_arrays(Array *arrays, int count) {
    while (count > 0) {
        PyBuffer_Release(&arrays[--count].view);
    }
}

// `count` tokens from `from` to `to`, widened when they differ in size.
static int copy_tokens(const Array *from, Py_ssize_t at, Py_ssize_t count, const Array *to) {
    Py_ssize_t in = from->view.itemsize, out = to->view.itemsize;
    const char *source = (const char *)from->view.buf + at * in;
    if (in == out) {
        memcpy(to->view.buf, source, (size_t)(count * in));
    } else if (out == 8 && in == 2) {
        for (Py_ssize_t i = 0; i < count; i++) ((int64_t *)to->view.buf)[i] = ((const uint16_t *)source)[i];
    } else if (out == 8 && in == 4) {
        for (Py_ssize_t i = 0; i < count; i++) ((int64_t *)to->view.buf)[i] = ((const uint32_t *)source)[i];
    } else {
        PyErr_Format(PyExc_TypeError, "tokens of %zd bytes into %zd", in, out);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(cut_doc,
"cut(tokens, begins, ids, offsets, at, place, out) -> (starts, ids, offsets, next place)\n\n"
"tokens uint16 or uint32[n]; begins, ids, offsets int64[pieces]; out int64[count], or of tokens' dtype.\n"
"`place` is the piece that holds token `at`. The results are bytearrays: int32, int64, int64.");

static PyObject *cut(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 7) {
        PyErr_SetString(PyExc_TypeError, "cut takes 7 arguments");
        return NULL;
    }
    Array arrays[5];
    static const char *names[] = {"tokens", "begins", "ids", "offsets", "out"};
    for (int i = 0; i < 5; i++) {
        PyObject *object = i < 4 ? args[i] : args[6];
        Py_ssize_t itemsize = i == 0 || i == 4 ? 0 : 8;
        if (open_array(object, &arrays[i], itemsize, i == 4 ? PyBUF_WRITABLE : 0, names[i]) != 0) {
            close_arrays(arrays, i);
            return NULL;
        }
    }
    Py_ssize_t at = PyLong_AsSsize_t(args[4]), place = PyLong_AsSsize_t(args[5]);
    PyObject *result = NULL, *starts = NULL, *ids = NULL, *offsets = NULL;
    Py_ssize_t pieces = arrays[1].length, count = arrays[4].length, stop = at + count;
    const int64_t *begins = arrays[1].view.buf, *all_ids = arrays[2].view.buf, *all_offsets = arrays[3].view.buf;
    if (PyErr_Occurred()) goto done;
    if (at < 0 || count < 1 || stop > arrays[0].length || place < 0 || place >= pieces || begins[place] > at ||
        arrays[2].length != pieces || arrays[3].length != pieces) {
        PyErr_SetString(PyExc_ValueError, "cut: outside of the stretch");
        goto done;
    }
    if (copy_tokens(&arrays[0], at, count, &arrays[4]) != 0) goto done;
    while (place + 1 < pieces && begins[place + 1] <= at) place++;  // past pieces that hold no token at all
    Py_ssize_t last = place;
    Py_ssize_t used = 0;
    for (; last < pieces && begins[last] < stop; last++) {
        used += last + 1 == pieces || begins[last + 1] > begins[last];
    }
    starts = PyByteArray_FromStringAndSize(NULL, used * 4);
    ids = PyByteArray_FromStringAndSize(NULL, used * 8);
    offsets = PyByteArray_FromStringAndSize(NULL, used * 8);
    if (starts == NULL || ids == NULL || offsets == NULL) goto done;
    int32_t *start_at = (int32_t *)PyByteArray_AsString(starts);
    int64_t *id_at = (int64_t *)PyByteArray_AsString(ids), *offset_at = (int64_t *)PyByteArray_AsString(offsets);
    for (Py_ssize_t piece = place, n = 0; piece < last; piece++) {
        if (piece + 1 < pieces && begins[piece + 1] == begins[piece]) continue;
        Py_ssize_t begin = begins[piece] > at ? begins[piece] : at;
        start_at[n] = (int32_t)(begin - at);
        id_at[n] = all_ids[piece];
        offset_at[n] = all_offsets[piece] + (begin - begins[piece]);
        n++;
    }
    // The piece that the token after these is in: the last one seen, or a later one that begins right there.
    Py_ssize_t next = last - 1;
    while (next + 1 < pieces && begins[next + 1] <= stop) next++;
    result = Py_BuildValue("(OOOn)", starts, ids, offsets, next);
done:
    Py_XDECREF(starts);
    Py_XDECREF(ids);
    Py_XDECREF(offsets);
    close_arrays(arrays, 5);
    return result;
}

PyDoc_STRVAR(layout_doc,
"layout(starts, ids, width, positions, mask) -> (cu_seqlens, document ids)\n\n"
"starts: list of int32[segments], ids: list of int64[segments], a pair a row; positions int64[rows, width - 1] and\n"
"mask bool[rows, width - 1] are filled. The results are bytearrays: int32[documents + 1], int64[documents].");

static PyObject *layout(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 5 || !PyList_Check(args[0]) || !PyList_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "layout takes two lists, a number and two arrays");
        return NULL;
    }
    Py_ssize_t rows = PyList_Size(args[0]), width = PyLong_AsSsize_t(args[2]);
    if (PyErr_Occurred()) return NULL;
    Array filled[2], pair[2];
    if (open_array(args[3], &filled[0], 8, PyBUF_WRITABLE, "positions") != 0) return NULL;
    if (open_array(args[4], &filled[1], 1, PyBUF_WRITABLE, "mask") != 0) {
        close_arrays(filled, 1);
        return NULL;
    }
    int64_t *positions = filled[0].view.buf;
    uint8_t *mask = filled[1].view.buf;
    Py_ssize_t documents = 0, inputs = width - 1;
    PyObject *result = NULL, *edges = NULL, *ids = NULL;
    if (width < 2 || PyList_Size(args[1]) != rows || filled[0].length != rows * inputs ||
        filled[1].length != rows * inputs) {
        PyErr_SetString(PyExc_ValueError, "layout: shapes do not fit");
        goto done;
    }
    memset(mask, 1, (size_t)(rows * inputs));
    // Twice over the rows: first to count, then to write.
    for (int writing = 0; writing < 2; writing++) {
        int32_t *edge = NULL;
        int64_t *id = NULL;
        if (writing) {
            edges = PyByteArray_FromStringAndSize(NULL, (documents + 1) * 4);
            ids = PyByteArray_FromStringAndSize(NULL, documents * 8);
            if (edges == NULL || ids == NULL) goto done;
            edge = (int32_t *)PyByteArray_AsString(edges);
            id = (int64_t *)PyByteArray_AsString(ids);
        }
        Py_ssize_t written = 0;
        for (Py_ssize_t row = 0; row < rows; row++) {
            if (open_array(PyList_GetItem(args[0], row), &pair[0], 4, 0, "starts") != 0) goto done;
            if (open_array(PyList_GetItem(args[1], row), &pair[1], 8, 0, "ids") != 0) {
                close_arrays(pair, 1);
                goto done;
            }
            const int32_t *starts = pair[0].view.buf;
            Py_ssize_t segments = pair[0].length;
            int sound = segments > 0 && pair[1].length == segments && starts[0] == 0;
            for (Py_ssize_t n = 0; sound && n < segments; n++) {
                sound = starts[n] < width && (n == 0 || starts[n] > starts[n - 1]);
                if (!sound) break;
                int64_t *row_positions = positions + row * inputs;
                if (writing && starts[n] > 0) mask[row * inputs + starts[n] - 1] = 0;
                if (starts[n] >= inputs) continue;  // begins at the last token, which is only ever predicted
                if (writing) {
                    Py_ssize_t stop = n + 1 < segments && starts[n + 1] < inputs ? starts[n + 1] : inputs;
                    for (Py_ssize_t i = starts[n]; i < stop; i++) row_positions[i] = i - starts[n];
                    edge[written] = (int32_t)(row * inputs + starts[n]);
                    id[written] = ((const int64_t *)pair[1].view.buf)[n];
                    written++;
                } else {
                    documents++;
                }
            }
            close_arrays(pair, 2);
            if (!sound) {
                PyErr_Format(PyExc_ValueError, "layout: the segments of row %zd do not ascend from 0", row);
                goto done;
            }
        }
        if (writing) edge[written] = (int32_t)(rows * inputs);
    }
    result = Py_BuildValue("(OO)", edges, ids);
done:
    Py_XDECREF(edges);
    Py_XDECREF(ids);
    close_arrays(filled, 2);
    return result;
}

PyDoc_STRVAR(count_doc,
"count(places, rows, positions, given, width)\n\n"
"positions int32[…, n] and given int64[…, 2], both by place: row i of `rows` int32[k, n] becomes that of places[i] of\n"
"`places` int64[k]; where places[i] < 0 that of ~places[i], and no sequence of `width` tokens is counted as given.");

static PyObject *count(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "count takes 5 arguments");
        return NULL;
    }
    static const char *names[] = {"places", "rows", "positions", "given"};
    static const Py_ssize_t sizes[] = {8, 4, 4, 8};
    Array arrays[4];
    for (int i = 0; i < 4; i++) {
        if (open_array(args[i], &arrays[i], sizes[i], i < 2 ? 0 : PyBUF_WRITABLE, names[i]) != 0) {
            close_arrays(arrays, i);
            return NULL;
        }
    }
    PyObject *result = NULL;
    Py_ssize_t pairs = arrays[0].length, width = PyLong_AsSsize_t(args[4]);
    if (PyErr_Occurred()) goto done;
    Py_ssize_t known = arrays[3].length / 2, each = known ? arrays[2].length / known : 0;
    if (arrays[1].length != pairs * each || arrays[2].length != known * each) {
        PyErr_SetString(PyExc_ValueError, "count: shapes do not fit");
        goto done;
    }
    const int64_t *places = arrays[0].view.buf;
    const int32_t *rows = arrays[1].view.buf;
    int32_t *positions = arrays[2].view.buf;
    int64_t *given = arrays[3].view.buf;
    for (Py_ssize_t i = 0; i < pairs; i++) {
        int64_t place = places[i] < 0 ? ~places[i] : places[i];
        if (place >= known) {
            PyErr_SetString(PyExc_ValueError, "count: no such place");
            goto done;
        }
        memcpy(positions + place * each, rows + i * each, (size_t)each * 4);
        if (places[i] >= 0) {
            given[2 * place] += 1;
            given[2 * place + 1] += width;
        }
    }
    result = Py_NewRef(Py_None);
done:
    close_arrays(arrays, 4);
    return result;
}

static PyMethodDef methods[] = {
    {"cut", (PyCFunction)(void (*)(void))cut, METH_FASTCALL, cut_doc},
    {"layout", (PyCFunction)(void (*)(void))layout, METH_FASTCALL, layout_doc},
    {"count", (PyCFunction)(void (*)(void))count, METH_FASTCALL, count_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_sequences",
    .m_doc = "Inner loops of the data scheduler.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__sequences(void) { return PyModule_Create(&module); }
