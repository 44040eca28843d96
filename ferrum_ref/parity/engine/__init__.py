"""Laws of the engine's parts: blocks, caches, steps, streams of text.  They are driven through the contracts alone.

The parts come from outside (`EngineParts`): the judge imports none of them.  Clauses: PA-ENGINE-1..4.
"""
