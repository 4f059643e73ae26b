"""Found on PYTHONPATH by every Python that starts beside the software GPU."""

import os

if os.environ.get("SOFTWARE_GPU"):
    from tests.support.software_gpu import launches

    launches.install(os.environ["SOFTWARE_GPU"])
