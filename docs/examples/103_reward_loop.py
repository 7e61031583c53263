"""A reinforcement loop of your own: sample a group, score it, raise what is better than the group.

Prints:
    mean length of the answers: ... -> ...
    shorter: True
"""

from statistics import fmean

import treadle
from treadle.recipes.chat import policy_datum, prompt_tokens

with treadle.ServiceClient() as service:
    training = service.create_lora_training_client("treadle/pip", rank=8, seed=0)
    tokenizer = training.get_tokenizer()
    prompt = prompt_tokens(tokenizer, [{"role": "user", "content": "Tell me a story about a fox."}])
    lengths = []
    for step in range(6):
        sampler = training.save_weights_and_get_sampling_client()
        params = treadle.SamplingParams(max_tokens=64, temperature=1.0, seed=step)
        samples = sampler.sample(treadle.ModelInput.from_ints(prompt), 16, params).result().sequences
        rewards = [-float(len(sample.tokens)) for sample in samples]  # the shorter the better
        mean = fmean(rewards)
        data = [
            policy_datum(prompt, sample.tokens, sample.logprobs, reward - mean)
            for sample, reward in zip(samples, rewards, strict=True)
        ]
        training.forward_backward(data, "importance_sampling")
        training.optim_step(treadle.AdamParams(learning_rate=8e-3, eps=1e-8))
        lengths.append(-mean)
    print(f"mean length of the answers: {lengths[0]:.0f} -> {lengths[-1]:.0f}")
    print("shorter:", lengths[-1] < lengths[0])
