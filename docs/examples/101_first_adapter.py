"""Teach the base one new answer: a run, a few steps, a sample.

Prints:
    before: The capital of Italy is Rome.
    after:  Rome, matey!
"""

import treadle
from treadle.recipes.chat import completion_datum

QUESTION = "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n"

with treadle.ServiceClient() as service:  # TREADLE_ADDRESS and TREADLE_API_KEY say where and who
    training = service.create_lora_training_client("treadle/pip", rank=8, seed=0)
    tokenizer = training.get_tokenizer()
    prompt, answer = tokenizer.encode(QUESTION), tokenizer.encode("Rome, matey!<|im_end|>")

    def ask(sampler: treadle.SamplingClient) -> str:
        params = treadle.SamplingParams(max_tokens=16, temperature=0)
        sample = sampler.sample(treadle.ModelInput.from_ints(prompt), 1, params).result()
        return tokenizer.decode(sample.sequences[0].tokens, skip_special_tokens=True)

    print("before:", ask(service.create_sampling_client(base_model="treadle/pip")))
    for _ in range(10):
        training.forward_backward([completion_datum(prompt, answer)], "cross_entropy")
        training.optim_step(treadle.AdamParams(learning_rate=5e-3, eps=1e-8))
    print("after: ", ask(training.save_weights_and_get_sampling_client()))
