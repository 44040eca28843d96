"""The largest error of an honest run before its final store, element by element, one file per class of operation.

Every function takes an `ErrorModel` first and float64 arrays after it, returns the error e of the unrounded result, and
is pure. `ErrorModel.stored` turns e into the bound B of the stored result. Derivations: specs/parity.md, PA-*.
"""
