"""What the two papers say, bottom up: primitives, position, attention, hyperprior, context, groupedmixer,
entropy_model, priors, gain, transforms, and the network that wires them up.

Letters in shapes: B pictures of H x W pixels. A grid of h x w = H/16 x W/16 sites, each with M latents (and Z
hyper-latents a quarter as fine); a token stands for a site. t tokens, q queries, n keys, s sites of one step; D the
width of tokens, d = D / heads.
"""
