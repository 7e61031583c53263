"""Tokens as they are drawn, with asyncio: several streams at once, left early.

Prints:
    ...
    read 8 tokens of each of 3 stories
"""

import asyncio

import treadle
from treadle.recipes.chat import prompt_tokens


async def beginning(sampler: treadle.SamplingClient, prompt: list[int], seed: int) -> list[int]:
    """Reads the first tokens of a story and leaves."""
    params = treadle.SamplingParams(max_tokens=64, temperature=1.0, seed=seed)
    tokens: list[int] = []
    async for delta in sampler.sample_stream(treadle.ModelInput.from_ints(prompt), 1, params):
        tokens += delta.tokens
        if len(tokens) >= 8:
            break
    return tokens[:8]


async def main() -> None:
    with treadle.ServiceClient() as service:
        sampler = service.create_sampling_client(base_model="treadle/pip")
        tokenizer = sampler.get_tokenizer()
        prompt = prompt_tokens(tokenizer, [{"role": "user", "content": "Tell me a story about a fox."}])
        stories = await asyncio.gather(*(beginning(sampler, prompt, seed) for seed in range(3)))
        for story in stories:
            print(tokenizer.decode(story))
        print(f"read {len(stories[0])} tokens of each of {len(stories)} stories")


asyncio.run(main())
