"""A byte-level or token-level language model on parallel nonlinear RNNs: configuration, model, training, generation."""

from .config import ParaRNNConfig
from .generate import generate, generate_text
from .model import Cache, CausalLMOutput, ParaRNNForCausalLM

__all__ = ["Cache", "CausalLMOutput", "ParaRNNConfig", "ParaRNNForCausalLM", "generate", "generate_text"]
