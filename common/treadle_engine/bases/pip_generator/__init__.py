"""How Pip, the bundled 0.87 M parameter base, is made: corpus, tokenizer and training, all from this code.

`python -m treadle_engine.bases.pip_generator --out DIR` writes a Hugging Face folder. Every sentence is produced
by `corpus.py`, so the base carries no third-party text. Serving never imports this package.
"""
