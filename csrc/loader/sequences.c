// The inner loops of the data scheduler: what it does for every sequence, step or group of documents.
//
// `data_scheduler`'s sequences.py, mixture.py and order.py have the same functions in numpy; they are the definition, and
// what is used where this file was not compiled. All arguments are C-contiguous buffers of the dtype that is named;
// nothing here keeps a reference.
// Built against Python's stable ABI (3.11 and newer), without numpy's headers.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
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
"cut(tokens, begins, ids, offsets, at, place, out) -> (starts, ids, offsets, next place, next token)\n\n"
"tokens uint16 or uint32[n]; begins, ids, offsets int64[pieces]; out int64[count], or of tokens' dtype.\n"
"`place` is the piece that holds token `at`; the next token is counted in its document. The first three results are\n"
"bytearrays: int32, int64, int64.");

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
    Py_ssize_t token = (Py_ssize_t)(all_offsets[next] + stop - begins[next]);
    result = Py_BuildValue("(OOOnn)", starts, ids, offsets, next, token);
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

PyDoc_STRVAR(join_doc,
"join(rows, before, after, itemsize) -> (tokens, begins)\n\n"
"rows: list of uint16 or uint32[...], before and after uint32[...]. The results are bytearrays: unsigned integers of\n"
"`itemsize` bytes, 2 or 4, and int64[rows].");

static void put_tokens(char *to, Py_ssize_t out, const Array *from) {
    Py_ssize_t in = from->view.itemsize;
    if (in == out) {
        memcpy(to, from->view.buf, (size_t)(from->length * in));
    } else if (out == 2) {
        const uint32_t *wide = from->view.buf;
        for (Py_ssize_t i = 0; i < from->length; i++) ((uint16_t *)to)[i] = (uint16_t)wide[i];
    } else {
        const uint16_t *narrow = from->view.buf;
        for (Py_ssize_t i = 0; i < from->length; i++) ((uint32_t *)to)[i] = narrow[i];
    }
}

static int open_tokens(PyObject *object, Array *array) {
    if (open_array(object, array, 0, 0, "tokens") != 0) return -1;
    if (array->view.itemsize == 2 || array->view.itemsize == 4) return 0;
    PyErr_Format(PyExc_TypeError, "tokens of %zd bytes", array->view.itemsize);
    PyBuffer_Release(&array->view);
    return -1;
}

static PyObject *join(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 4 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "join takes a list, two arrays and a number");
        return NULL;
    }
    Py_ssize_t rows = PyList_Size(args[0]), itemsize = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred()) return NULL;
    if (itemsize != 2 && itemsize != 4) {
        PyErr_SetString(PyExc_ValueError, "join: tokens of 2 or 4 bytes");
        return NULL;
    }
    Array edges[2];
    if (open_tokens(args[1], &edges[0]) != 0) return NULL;
    if (open_tokens(args[2], &edges[1]) != 0) {
        close_arrays(edges, 1);
        return NULL;
    }
    PyObject *result = NULL, *tokens = NULL, *begins = NULL;
    Array *open = PyMem_Malloc((size_t)(rows ? rows : 1) * sizeof(Array));
    Py_ssize_t opened = 0, total = rows * (edges[0].length + edges[1].length);
    if (open == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (; opened < rows; opened++) {
        if (open_tokens(PyList_GetItem(args[0], opened), &open[opened]) != 0) goto done;
        total += open[opened].length;
    }
    tokens = PyByteArray_FromStringAndSize(NULL, total * itemsize);
    begins = PyByteArray_FromStringAndSize(NULL, rows * 8);
    if (tokens == NULL || begins == NULL) goto done;
    char *to = PyByteArray_AsString(tokens);
    int64_t *begin = (int64_t *)PyByteArray_AsString(begins), at = 0;
    for (Py_ssize_t row = 0; row < rows; row++) {
        const Array *parts[] = {&edges[0], &open[row], &edges[1]};
        begin[row] = at;
        for (int part = 0; part < 3; part++) {
            put_tokens(to + at * itemsize, itemsize, parts[part]);
            at += parts[part]->length;
        }
    }
    result = Py_BuildValue("(OO)", tokens, begins);
done:
    Py_XDECREF(tokens);
    Py_XDECREF(begins);
    if (open != NULL) close_arrays(open, (int)opened);
    PyMem_Free(open);
    close_arrays(edges, 2);
    return result;
}

PyDoc_STRVAR(lay_doc,
"lay(counts, sources, asked, lanes, order, laid, number of sources)\n\n"
"counts int64[k] of sources int64[k]; asked int32[lanes, sources], brought up to date; lanes and order int64[batch];\n"
"laid int32[batch], filled.");

static PyObject *lay(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 7) {
        PyErr_SetString(PyExc_TypeError, "lay takes 7 arguments");
        return NULL;
    }
    static const char *names[] = {"counts", "sources", "asked", "lanes", "order", "laid"};
    static const Py_ssize_t sizes[] = {8, 8, 4, 8, 8, 4};
    Array arrays[6];
    for (int i = 0; i < 6; i++) {
        if (open_array(args[i], &arrays[i], sizes[i], i == 2 || i == 5 ? PyBUF_WRITABLE : 0, names[i]) != 0) {
            close_arrays(arrays, i);
            return NULL;
        }
    }
    PyObject *result = NULL;
    Py_ssize_t *left = NULL;
    const int64_t *counts = arrays[0].view.buf, *sources = arrays[1].view.buf;
    const int64_t *lanes = arrays[3].view.buf, *order = arrays[4].view.buf;
    int32_t *asked = arrays[2].view.buf, *laid = arrays[5].view.buf;
    Py_ssize_t batch = arrays[3].length, wide = PyLong_AsSsize_t(args[6]), total = 0;
    if (PyErr_Occurred()) goto done;
    int sound = wide > 0 && arrays[0].length == arrays[1].length;
    sound = sound && arrays[4].length == batch && arrays[5].length == batch;
    Py_ssize_t most = sound ? arrays[2].length / wide : 0;
    for (Py_ssize_t i = 0; sound && i < arrays[0].length; i++) {
        sound = counts[i] >= 0 && sources[i] >= 0 && sources[i] < wide;
        total += sound ? counts[i] : 0;
    }
    for (Py_ssize_t i = 0; sound && i < batch; i++) {
        sound = lanes[i] >= 0 && lanes[i] < most && order[i] >= 0 && order[i] < batch;
    }
    if (!sound || total != batch) {
        PyErr_SetString(PyExc_ValueError, "lay: shapes or numbers do not fit");
        goto done;
    }
    left = PyMem_Malloc((size_t)(batch ? batch : 1) * sizeof(Py_ssize_t));
    if (left == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    memcpy(left, order, (size_t)batch * sizeof(Py_ssize_t));
    Py_ssize_t free_slots = batch;
    for (Py_ssize_t i = 0; i < arrays[0].length; i++) {
        const int32_t *column = asked + sources[i];
        for (Py_ssize_t count = counts[i]; count > 0;) {
            // The lanes asked least, in the order given; then those asked once more often that are left, and so on.
            int32_t level = INT32_MAX;
            for (Py_ssize_t n = 0; n < free_slots; n++) {
                int32_t times = column[lanes[left[n]] * wide];
                level = times < level ? times : level;
            }
            Py_ssize_t kept = 0;
            for (Py_ssize_t n = 0; n < free_slots; n++) {
                if (count > 0 && column[lanes[left[n]] * wide] == level) {
                    laid[left[n]] = (int32_t)sources[i];
                    count--;
                } else {
                    left[kept++] = left[n];
                }
            }
            free_slots = kept;
        }
    }
    for (Py_ssize_t i = 0; i < batch; i++) asked[lanes[i] * wide + laid[i]]++;
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(left);
    close_arrays(arrays, 6);
    return result;
}

PyDoc_STRVAR(tally_doc,
"tally(asked, lanes, sources, number of sources)\n\n"
"asked int32[lanes, sources]; one more for each of lanes int64[batch] and the source int32[batch] beside it.");

static PyObject *tally(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "tally takes 4 arguments");
        return NULL;
    }
    static const char *names[] = {"asked", "lanes", "sources"};
    static const Py_ssize_t sizes[] = {4, 8, 4};
    Array arrays[3];
    for (int i = 0; i < 3; i++) {
        if (open_array(args[i], &arrays[i], sizes[i], i == 0 ? PyBUF_WRITABLE : 0, names[i]) != 0) {
            close_arrays(arrays, i);
            return NULL;
        }
    }
    PyObject *result = NULL;
    int32_t *asked = arrays[0].view.buf;
    const int64_t *lanes = arrays[1].view.buf;
    const int32_t *sources = arrays[2].view.buf;
    Py_ssize_t wide = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred()) goto done;
    int sound = wide > 0 && arrays[1].length == arrays[2].length;
    Py_ssize_t most = sound ? arrays[0].length / wide : 0;
    for (Py_ssize_t i = 0; sound && i < arrays[1].length; i++) {
        sound = lanes[i] >= 0 && lanes[i] < most && sources[i] >= 0 && sources[i] < wide;
    }
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, "tally: shapes or numbers do not fit");
        goto done;
    }
    for (Py_ssize_t i = 0; i < arrays[1].length; i++) asked[lanes[i] * wide + sources[i]]++;
    result = Py_NewRef(Py_None);
done:
    close_arrays(arrays, 3);
    return result;
}

PyDoc_STRVAR(shuffle_doc,
"shuffle(key, size) -> order\n\n"
"key: 16 bytes, two little-endian 64-bit integers. The result is a bytearray of int64[size]: the stable order of as\n"
"many numbers of Philox4x64-10 (Salmon et al., SC 2011) with this key, as numpy draws them.");

static void philox(uint64_t counter, uint64_t key0, uint64_t key1, uint64_t out[4]) {
    uint64_t x0 = counter, x1 = 0, x2 = 0, x3 = 0;
    for (int round = 0; round < 10; round++) {
        unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93ULL * x0;
        unsigned __int128 b = (unsigned __int128)0xCA5A826395121157ULL * x2;
        x0 = (uint64_t)(b >> 64) ^ x1 ^ key0;
        x2 = (uint64_t)(a >> 64) ^ x3 ^ key1;
        x1 = (uint64_t)b;
        x3 = (uint64_t)a;
        key0 += 0x9E3779B97F4A7C15ULL;
        key1 += 0xBB67AE8584CAA73BULL;
    }
    out[0] = x0, out[1] = x1, out[2] = x2, out[3] = x3;
}

typedef struct {
    uint64_t drawn;
    int64_t place;
} Draw;

static int by_number(const void *a, const void *b) {
    const Draw *one = a, *other = b;
    if (one->drawn != other->drawn) return one->drawn < other->drawn ? -1 : 1;
    return one->place < other->place ? -1 : 1;
}

static PyObject *shuffle(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Array key;
    if (nargs != 2 || open_array(args[0], &key, 1, 0, "key") != 0) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "shuffle takes 2 arguments");
        return NULL;
    }
    PyObject *order = NULL;
    Draw *draws = NULL;
    Py_ssize_t size = PyLong_AsSsize_t(args[1]);
    if (PyErr_Occurred()) goto done;
    if (size < 0 || key.length != 16) {
        PyErr_SetString(PyExc_ValueError, "shuffle: a key of 16 bytes and a size from 0 on");
        goto done;
    }
    uint64_t keys[2] = {0, 0};
    for (int i = 0; i < 16; i++) keys[i / 8] |= (uint64_t)((const uint8_t *)key.view.buf)[i] << (8 * (i % 8));
    order = PyByteArray_FromStringAndSize(NULL, size * 8);
    draws = PyMem_Malloc((size_t)(size + 4) * sizeof(Draw));
    if (order == NULL || draws == NULL) {
        if (draws == NULL) PyErr_NoMemory();
        Py_CLEAR(order);
        goto done;
    }
    for (Py_ssize_t i = 0; i < size; i += 4) {
        uint64_t four[4];
        philox((uint64_t)(i / 4 + 1), keys[0], keys[1], four);
        for (int n = 0; n < 4; n++) draws[i + n] = (Draw){four[n], i + n};
    }
    if (size <= 32) {
        for (Py_ssize_t i = 1; i < size; i++) {
            Draw draw = draws[i];
            Py_ssize_t n = i;
            for (; n > 0 && draws[n - 1].drawn > draw.drawn; n--) draws[n] = draws[n - 1];
            draws[n] = draw;
        }
    } else {
        qsort(draws, (size_t)size, sizeof(Draw), by_number);
    }
    int64_t *places = (int64_t *)PyByteArray_AsString(order);
    for (Py_ssize_t i = 0; i < size; i++) places[i] = draws[i].place;
done:
    PyMem_Free(draws);
    PyBuffer_Release(&key.view);
    return order;
}

static PyMethodDef methods[] = {
    {"cut", (PyCFunction)(void (*)(void))cut, METH_FASTCALL, cut_doc},
    {"layout", (PyCFunction)(void (*)(void))layout, METH_FASTCALL, layout_doc},
    {"join", (PyCFunction)(void (*)(void))join, METH_FASTCALL, join_doc},
    {"lay", (PyCFunction)(void (*)(void))lay, METH_FASTCALL, lay_doc},
    {"tally", (PyCFunction)(void (*)(void))tally, METH_FASTCALL, tally_doc},
    {"shuffle", (PyCFunction)(void (*)(void))shuffle, METH_FASTCALL, shuffle_doc},
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

// One more whenever a function takes or gives something else; `data_scheduler/native.py` uses the module only where it is
// the one it was written for.
#define VERSION 2

PyMODINIT_FUNC PyInit__sequences(void) {
    PyObject *loops = PyModule_Create(&module);
    if (loops != NULL && PyModule_AddIntConstant(loops, "VERSION", VERSION) != 0) {
        Py_CLEAR(loops);
    }
    return loops;
}
