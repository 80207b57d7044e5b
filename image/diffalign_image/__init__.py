"""Image adapter: captioned shapes, rewards, a diffusers model, and the pre-training and alignment jobs."""
