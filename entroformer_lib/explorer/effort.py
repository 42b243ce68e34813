"""What a page will take, said before it is made: a few latents of each kind are computed and compressed."""

import gzip
import time

from entroformer_lib.explorer import page
from entroformer_lib.explorer.answers import data_url
from entroformer_lib.inspection.panels import offered_ks, own_k
from entroformer_lib.inspection.picture_server import QUERIES_AT_ONCE

SAMPLE = 8  # latents of each k
SAMPLE_COSTS = 8  # latents whose attended positions are hidden
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
        taken = _measured(page._section, server, sites, k, SAMPLE)
        seconds, size = seconds + taken[0], size + taken[1]
    if server.family == "rows":
        taken = _measured(page._costs, server, some, own, SAMPLE_COSTS)
        seconds, size = seconds + taken[0], size + taken[1]
    return seconds, size


def _measured(make, server, sites, k: int, count: int) -> tuple[float, float]:
    """Seconds and MB of the page that some sites take, judged by one of them and by a few: a batch has a price of its
    own, which many sites share."""
    few = list(dict.fromkeys(sites[i * len(sites) // count] for i in range(count)))
    make(server, few[:1], k, page._Blob(), lambda done: None)  # keys and values of this k, which are kept
    times, blob = [], page._Blob()
    for part in (few[:1], few):
        blob, start = page._Blob(), time.perf_counter()
        make(server, part, k, blob, lambda done: None)
        times.append(time.perf_counter() - start)
    each = max(times[1] - times[0], 0) / max(len(few) - 1, 1)
    batch = max(times[0] - each, 0)
    base64 = 4 / 3
    stored = base64 * len(gzip.compress(blob.bytes())) / len(few) / 1e6
    return each * len(sites) + batch * -(-len(sites) // QUERIES_AT_ONCE), stored * len(sites)
