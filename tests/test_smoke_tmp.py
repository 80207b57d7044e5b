import pytest, torch
from toys import *
from diffalign.diffusion import *
from diffalign.algorithms import *
from diffalign.train.state import TrainState
from diffalign.train.on_policy import optimize
from diffalign.rl.critics import ValueNet

def test_hook(generator):
    with pytest.raises(Exception, match="(?i)type"):
        FlowPath().level(torch.zeros(3, 3), 1)

def test_loop():
    net = MLPDenoiser()
    pol = toy_policy(net, FlowSDE())
    st = TrainState.create({"policy": net}, {"policy": 1e-3}, seed=0)
    it = optimize(FlowGRPO().compose(), pol, PromptBandit(), st)
    print(next(it))
    net = MLPDenoiser(prediction="eps")
    pol = toy_policy(net, DDPM(min_std=0.1))
    st = TrainState.create({"policy": net, "critic": ValueNet(1,(16,))}, {"policy": 1e-3, "critic": 1e-3}, seed=0)
    it = optimize(DPPO().compose(), pol, PointMass(), st)
    print(next(it))
