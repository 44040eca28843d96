"""Next token of a real model, by the numpy reference."""

from ferrum_ref.assembly import load_model

loaded = load_model("smollm2-135m", backend="numpy")  # or "torch", or "your.package:make_backend"
llm = loaded.new_llm()  # upstream's DecoderOnlyLLM
tokens = [int(t) for t in loaded.tokenizer.encode("The capital of France is", False)]
logits = llm.prefill("a", tokens)  # float32 [vocabulary]
print(loaded.tokenizer.decode([int(logits.argmax())], True))
