"""The judge: is an implementation of an operation as right as its declared arithmetic allows?

    units, error_model   unit roundoffs, gamma_n, and what an `Algorithm` declaration makes of them
    bounds/              the largest honest error of each class of operation, derived, element by element
    oracle               the float64 value of every operation on the stored inputs
    ops/                 per operation: shapes, probes, how a backend is called, what is expected
    subject              what is judged: a backend, or plain functions on arrays
    verdict              err / bound, and where the worst of it lies
    runner, report       a whole table of cells (operation x dtype), as text or JSON
    model, model_report  a whole model against a float64 run of the same weights

No tolerance is typed in anywhere.  Clauses: PA-* (specs/parity.md).
"""
