"""
Many trainings on Dask and on Ray
=================================

Retraining without some instances, training with other seeds and scoring with AID are made of independent jobs, which
go through joblib: to processes of this machine, or to whatever cluster is registered with it. The numbers stay the
same.
"""

# %%
# A small cleanser, and work for many machines
# --------------------------------------------
# Training anew with two seeds, with all rows and without some of them, makes six jobs; scoring 600 instances with AID
# as many as there are workers.

import time

import joblib
import matplotlib.pyplot as plt
import numpy as np
import torch
from distributed import Client, SubprocessCluster

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import AID
from ganclean.plotting import InfluenceHistogramDisplay
from ganclean.validation import counterfactual_retrain

torch.set_num_threads(1)
X = np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32)
cleanser = GANInfluence(trainer=GANTrainer(n_epochs=5), random_state=0).fit(X)
removals = [[], np.flatnonzero(~cleanser.support_), range(30)]


def work():
    """Return the metric of new trainings, the influences by AID, and the seconds that both took."""
    begin = time.perf_counter()
    retrained = counterfactual_retrain(cleanser, removals, seeds=[1, 2])
    aid = GANInfluence(trainer=cleanser.trainer, backend=AID(damping=1.0), random_state=0)
    aid.fit(X, trajectory=cleanser.trajectory_)
    return retrained, aid.influence_, time.perf_counter() - begin


def compare(where, *there):
    """Print how far numbers from a cluster are from those of this process."""
    deviation = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(there[:-1], here[:-1]))
    print(f"{where}: {there[-1]:.1f} s, largest relative deviation {deviation:.0e}")


here = work()
print(f"one process: {here[-1]:.1f} s")

# %%
# Dask
# ----
# Workers are processes of their own, each with one thread. On a real cluster, ``Client`` takes the scheduler's
# address. In a script, `LocalCluster` has to be started below ``if __name__ == "__main__":``, since it imports the
# script in every worker; `SubprocessCluster` does not.

cluster = SubprocessCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
with cluster, Client(cluster), joblib.parallel_config(backend="dask"):
    compare("Dask", *work())

# %%
# Ray
# ---
# Ray's back-end takes one worker where it is not told ``n_jobs``, and starts its workers anew for every call. Jobs as
# small as these take less time than the start of a worker, and a cluster is a loss; it pays where a training takes
# minutes.

try:
    import ray
    from ray.util.joblib import register_ray
except ImportError:
    print('Ray is not installed: pip install "ganclean[cluster]"')
else:
    register_ray()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with joblib.parallel_config(backend="ray", n_jobs=-1):
        compare("Ray", *work())
    ray.shutdown()

# %%
# What was sent
# -------------
# The networks, the data, the metric and the seed of each run; the recorded trajectory stays here. The cleanser's own
# influences, for which nothing was sent:

InfluenceHistogramDisplay.from_estimator(cleanser)
plt.show()
