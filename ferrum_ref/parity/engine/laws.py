"""All laws of the engine's parts."""

from __future__ import annotations

from ferrum_ref.parity.engine.blocks import BLOCK_LAWS
from ferrum_ref.parity.engine.law import Law
from ferrum_ref.parity.engine.steps import STEP_LAWS
from ferrum_ref.parity.engine.streams import STREAM_LAWS

LAWS: tuple[Law, ...] = (*BLOCK_LAWS, *STEP_LAWS, *STREAM_LAWS)
