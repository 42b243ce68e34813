"""What a page will take, said before it is made: a few latents of each kind are computed and compressed."""

import gzip
import time

from entroformer_lib.explorer import page
from entroformer_lib.explorer.answers import data_url
from entroformer_lib.inspection.panels import offered_ks, own_k

SAMPLE = 8  # latents of each k
SAMPLE_COSTS = 2  # latents whose attended positions are hidden
AROUND = 0.1  # MB that the script takes
PICTURES = 3  # of about the same size


def effort(server) -> tuple[float, float]:
    """About how many seconds `explorer_page` will compute, and how many MB the page will have.

    Raises:
        AttentionError: the picture is too large for a page.
    """
    page._check_size(server)
    own, every, some = own_k(server), range(server.n), page.lattice(server, offered_ks(server))
    seconds, size = 0.0, AROUND + PICTURES * len(data_url(server.picture)) / 1e6
    for k in offered_ks(server):
        sites = every if k == own and server.row_entries else some
        one, stored = _measured(page._section, server, sites, k, SAMPLE)
        seconds, size = seconds + one * len(sites), size + stored * len(sites)
    if server.family == "rows":
        one, stored = _measured(page._costs, server, some, own, SAMPLE_COSTS)
        seconds, size = seconds + one * len(some), size + stored * len(some)
    return seconds, size


def _measured(make, server, sites, k: int, count: int) -> tuple[float, float]:
    """Seconds and MB of the page that one site takes, by a few of them."""
    few = list(dict.fromkeys(sites[i * len(sites) // count] for i in range(count)))
    make(server, few[:1], k, page._Blob(), lambda done: None)  # keys and values of this k, which are kept
    blob, start = page._Blob(), time.perf_counter()
    make(server, few, k, blob, lambda done: None)
    base64 = 4 / 3
    return (time.perf_counter() - start) / len(few), base64 * len(gzip.compress(blob.bytes())) / len(few) / 1e6
