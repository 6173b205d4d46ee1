// The Python module memkernel._C: importing it registers the ops of bindings.cpp; its functions tell and choose the
// instruction set.
#include <Python.h>

#include "cpu/kernels.h"

namespace {

PyObject* isas(PyObject*, PyObject*) {
  const memkernel::Kernels* const* tables;
  const int count = memkernel::kernel_tables(&tables);
  PyObject* names = PyList_New(count);
  if (!names) return nullptr;
  for (int i = 0; i < count; ++i) PyList_SetItem(names, i, PyUnicode_FromString(tables[i]->isa));
  return names;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(memkernel::kernels().isa); }

PyObject* set_isa(PyObject*, PyObject* name) {
  Py_ssize_t length;
  const char* chars = PyUnicode_AsUTF8AndSize(name, &length);
  if (!chars) return nullptr;
  if (!memkernel::use_kernels(chars))
    return PyErr_Format(PyExc_ValueError, "isa: expected one of isas(), got %R", name);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "The instruction sets that kernels exist for on this machine, slowest first."},
    {"isa", isa, METH_NOARGS, "The instruction set in use, at first the last of isas()."},
    {"set_isa", set_isa, METH_O, "Use the kernels for another of isas(), in the whole process."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
