"""The closed union of algorithms: each is a spec whose `compose()` gives the pieces of the on-policy loop."""

from typing import Annotated

from pydantic import Field

from diffalign.algorithms.awm import AWM
from diffalign.algorithms.ddpo import DDPO
from diffalign.algorithms.dppo import DPPO
from diffalign.algorithms.flow_grpo import FlowGRPO
from diffalign.algorithms.grpo_guard import GRPOGuard
from diffalign.algorithms.nft import DiffusionNFT

Algorithm = Annotated[DDPO | FlowGRPO | GRPOGuard | DPPO | AWM | DiffusionNFT, Field(discriminator="type")]

__all__ = ["AWM", "DDPO", "DPPO", "Algorithm", "DiffusionNFT", "FlowGRPO", "GRPOGuard"]
