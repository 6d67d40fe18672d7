import smallcoder_jax  # noqa: F401  before anything else: it says what an environment lacks
