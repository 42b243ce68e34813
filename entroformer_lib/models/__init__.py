"""What the two papers say, bottom up: config, primitives, transforms, position, attention, hyperprior, context,
groupedmixer, gain, entropy_model, priors, and the network that wires them up.

Letters in shapes: B pictures of H x W pixels. y has M latents at each site of a grid of h x w = H/16 x W/16 sites, and
z has Z hyper-latents at each site of an h/4 x w/4 grid. A token stands for a site: t tokens, q queries, n keys or
sites, s sites of one step. D is the width of tokens, and d = D / heads. C is any number of channels, m that of one step
or group. Blocks of the transforms and of the hyperprior use h x w for their own grid. In position.py h is also the
clipping distance of eq. 5.
"""
