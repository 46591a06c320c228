"""Language models on parallel nonlinear RNNs, as Hugging Face models: configuration, model, training, generation."""

# ruff: noqa: E402
from ..errors import needs

needs("parashoot.lm", "lm", "safetensors")
needs("parashoot.lm", "lm", "transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import Cache
from .config import ParaRNNConfig
from .decode import Decoder
from .generate import generate, generate_text
from .model import ParaRNNForCausalLM, ParaRNNModel

AutoConfig.register(ParaRNNConfig.model_type, ParaRNNConfig, exist_ok=True)
AutoModel.register(ParaRNNConfig, ParaRNNModel, exist_ok=True)
AutoModelForCausalLM.register(ParaRNNConfig, ParaRNNForCausalLM, exist_ok=True)

__all__ = [
    "Cache",
    "Decoder",
    "ParaRNNConfig",
    "ParaRNNForCausalLM",
    "ParaRNNModel",
    "generate",
    "generate_text",
]
