"""The closed unions of algorithms: each is a spec whose `compose()` gives the pieces of the on-policy, off-policy or
preference loop."""

from typing import Annotated

from pydantic import Field

from diffalign.algorithms.awm import AWM
from diffalign.algorithms.ddpo import DDPO
from diffalign.algorithms.dpo import DPO
from diffalign.algorithms.dpok import DPOK
from diffalign.algorithms.dppo import DPPO
from diffalign.algorithms.dsrl import DSRL
from diffalign.algorithms.expo import EXPO
from diffalign.algorithms.flow_grpo import FlowGRPO
from diffalign.algorithms.fpo import FPO
from diffalign.algorithms.fpo_plus import FPOPlus
from diffalign.algorithms.grpo_guard import GRPOGuard
from diffalign.algorithms.nft import DiffusionNFT
from diffalign.algorithms.noise_ppo import NoisePPO
from diffalign.algorithms.orw import ORW
from diffalign.algorithms.reinflow import ReinFlow
from diffalign.algorithms.rerank import Rerank
from diffalign.algorithms.residual import ResidualRL
from diffalign.algorithms.seppo import SePPO

Algorithm = Annotated[DDPO | DPOK | FlowGRPO | GRPOGuard | DPPO | AWM | DiffusionNFT | ORW | NoisePPO | ReinFlow |
                      FPO | FPOPlus, Field(discriminator="type")]
PreferenceAlgorithm = Annotated[SePPO | DPO, Field(discriminator="type")]
OffPolicyAlgorithm = Annotated[DSRL | ResidualRL | EXPO | Rerank, Field(discriminator="type")]

__all__ = ["AWM", "DDPO", "DPO", "DPOK", "DPPO", "DSRL", "EXPO", "FPO", "ORW", "Algorithm", "DiffusionNFT",
           "FPOPlus", "FlowGRPO", "GRPOGuard", "NoisePPO", "OffPolicyAlgorithm", "PreferenceAlgorithm", "ReinFlow",
           "Rerank", "ResidualRL", "SePPO"]
