"""Three requests at once through the engine: one scheduler, one paged KV cache, one forward pass a step."""

import asyncio

from ferrum_ref.assembly import load_model
from ferrum_ref.serving import build_engine
from ferrum_ref.types.requests import InferenceRequest
from ferrum_ref.types.sampling import SamplingParams


async def main() -> None:
    loaded = load_model("smollm2-135m")
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    prompts = ["The capital of France is", "Water boils at", "One, two, three,"]
    async with build_engine(loaded, num_blocks=64) as engine:
        requests = [InferenceRequest.new(p, loaded.info.model_id).with_sampling_params(greedy) for p in prompts]
        for answer in await asyncio.gather(*(engine.infer(request) for request in requests)):
            print(repr(answer.text), answer.finish_reason.name, answer.usage.completion_tokens)


asyncio.run(main())
