"""`ForwardBatch` under the decoder's roof; it is defined with the other interfaces because executors build it too."""

from ferrum_ref.interfaces.forward import ForwardBatch

__all__ = ["ForwardBatch"]
