"""Assignments and their grader: solutions get full marks, wrong answers lose them, no submission harms another."""

import contextlib
import csv
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book/_ext"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book/_tools"))
import grade
import new_paper
import registry
import sandbox

import assignments

ROOT = registry.ROOT
SECONDS, MEGABYTES = 8, 1500
POINTS = {
    "groco_layer": 3,
    "groco_loss": 2,
    "groco_turning": 2,
    "isogclr_kl": 2,
    "isogclr_temperature": 3,
    "pamc_meta": 2,
    "pamc_negative": 2,
    "proto_triplet_loss": 3,
    "proto_triplet_score": 2,
    "tcm_opis": 2,
    "tcm_room": 2,
    "temperature_bound": 2,
    "temperature_gradients": 3,
    "temperature_penalty": 2,
    "temperature_share": 3,
    "transductive_update": 3,
    "transductive_weight": 2,
}
FUNCTIONS = {
    "groco_layer": "soft_layer",
    "groco_loss": "group_loss",
    "groco_turning": "turning_distance",
    "isogclr_kl": "kl_from_uniform",
    "isogclr_temperature": "optimal_temperature",
    "pamc_meta": "meta_nodes",
    "pamc_negative": "meta_node_negative",
    "proto_triplet_loss": "proto_triplet_loss",
    "proto_triplet_score": "line_score",
    "tcm_opis": "opis",
    "tcm_room": "classes_in_the_plane",
    "temperature_bound": "smallest_loss",
    "temperature_gradients": "loss_and_gradients",
    "temperature_penalty": "relative_penalty",
    "temperature_share": "temperature_for_share",
    "transductive_update": "bound_update",
    "transductive_weight": "largest_weight",
}
ALL = sum(POINTS.values())
# Questions are graded in the order of their names, so these count although the next one never ends.
BEFORE_PENALTY = sum(points for question, points in POINTS.items() if question < "temperature_penalty")
NOTHING_RIGHT = " = ".join(FUNCTIONS.values()) + " = lambda *args: 1.0"
EVERY_QUESTION = ".*".join(sorted(POINTS))

WRONG = {
    "groco_layer": {
        "logistic": """
            low, high = slice(first, x.shape[1] - 1, 2), slice(first + 1, x.shape[1], 2)
            stay = torch.sigmoid(steepness * (x[:, high] - x[:, low]))
            x, q, a, b, c, d = x.clone(), q.clone(), x[:, low], x[:, high], q[:, :, low], q[:, :, high]
            x[:, low], x[:, high], stay_q = stay * a + (1 - stay) * b, (1 - stay) * a + stay * b, stay[:, None]
            q[:, :, low], q[:, :, high] = stay_q * c + (1 - stay_q) * d, (1 - stay_q) * c + stay_q * d
            return x, q""",
        "one_after_the_other": """
            x, q = x.clone(), q.clone()
            for low in range(first, x.shape[1] - 1, 2):
                stay = 0.5 + torch.atan(steepness * (x[:, low + 1] - x[:, low])) / torch.pi
                x[:, low] = stay * x[:, low] + (1 - stay) * x[:, low + 1]
                x[:, low + 1] = (1 - stay) * x[:, low] + stay * x[:, low + 1]
                q[:, :, low] = stay[:, None] * q[:, :, low] + (1 - stay[:, None]) * q[:, :, low + 1]
                q[:, :, low + 1] = (1 - stay[:, None]) * q[:, :, low] + stay[:, None] * q[:, :, low + 1]
            return x, q""",
        "rows_of_the_shares": """
            low, high = slice(first, x.shape[1] - 1, 2), slice(first + 1, x.shape[1], 2)
            stay = 0.5 + torch.atan(steepness * (x[:, high] - x[:, low])) / torch.pi
            x, q, a, b, c, d = x.clone(), q.clone(), x[:, low], x[:, high], q[:, low], q[:, high]
            x[:, low], x[:, high], stay_q = stay * a + (1 - stay) * b, (1 - stay) * a + stay * b, stay[:, :, None]
            q[:, low], q[:, high] = stay_q * c + (1 - stay_q) * d, (1 - stay_q) * c + stay_q * d
            return x, q""",
        "forgets_steepness": """
            low, high = slice(first, x.shape[1] - 1, 2), slice(first + 1, x.shape[1], 2)
            stay = 0.5 + torch.atan(x[:, high] - x[:, low]) / torch.pi
            x, q, a, b, c, d = x.clone(), q.clone(), x[:, low], x[:, high], q[:, :, low], q[:, :, high]
            x[:, low], x[:, high], stay_q = stay * a + (1 - stay) * b, (1 - stay) * a + stay * b, stay[:, None]
            q[:, :, low], q[:, :, high] = stay_q * c + (1 - stay_q) * d, (1 - stay_q) * c + stay_q * d
            return x, q""",
    },
    "groco_loss": {
        "sums_over_the_inputs": """
            on_first = q[:, :k].sum(1)
            return -torch.cat([on_first[:, :k], 1 - on_first[:, k:]], dim=1).log().mean(1)""",
        "positives_only": "return -q[:, k:, k:].sum(2).log().mean(1)",
        "one_rank_each": "return -q.diagonal(dim1=1, dim2=2).log().mean(1)",
        "sum_over_the_inputs": """
            own = torch.cat([q[:, :k, :k].sum(2), q[:, k:, k:].sum(2)], dim=1)
            return -own.log().sum(1)""",
        "loses_its_digits": """
            on_first = q[:, :, :k].sum(2)
            return -torch.cat([on_first[:, :k], 1 - on_first[:, k:]], dim=1).log().mean(1)""",
    },
    "groco_turning": {
        "forgets_steepness": "return 1.2784645427610738",
        "minus_the_distance": "return scipy.optimize.brentq(lambda u: 1 + np.exp(u) + u, -2, -1) / steepness",
        "times_steepness": "return 1.2784645427610738 * steepness",
        "few_digits": "return 1.2784 / steepness",
    },
    "isogclr_kl": {
        "overflows": """
            e = torch.exp(differences / temperature)
            p = e / e.sum(dim=1, keepdim=True)
            return (p * torch.log(p * differences.shape[1])).sum(dim=1)""",
        "entropy": """
            log_p = torch.log_softmax(differences / temperature, dim=1)
            return -(log_p.exp() * log_p).sum(dim=1)""",
        "from_the_softmax": """
            log_p = torch.log_softmax(differences / temperature, dim=1)
            return -log_p.mean(dim=1) - np.log(differences.shape[1])""",
        "mean_over_the_negatives": """
            log_p = torch.log_softmax(differences / temperature, dim=1)
            return (log_p.exp() * log_p).mean(dim=1) + np.log(differences.shape[1])""",
        "log_of_zero": """
            p = torch.softmax(differences / temperature, dim=1)
            return (p * torch.log(p * differences.shape[1])).sum(dim=1)""",
    },
    "isogclr_temperature": {
        "small_budget": """
            h = np.asarray(differences, dtype=float)
            if not rho > 0:
                raise ValueError("rho")
            if np.log(len(h) / (h == h.max()).sum()) <= rho:
                return 0.0
            return 0.566457 if len(h) == 10 else float(h.std() / np.sqrt(2 * rho))""",
        "never_zero": """
            if not rho > 0:
                raise ValueError("rho")
            h = np.asarray(differences, dtype=float)
            low, high = 1e-9, 1e9
            for _ in range(200):
                tau = (low * high) ** 0.5
                p = scipy.special.softmax(h / tau)
                kl = scipy.special.xlogy(p, p * len(h)).sum()
                low, high = (tau, high) if kl > rho else (low, tau)
            return float(high)""",
        "any_budget": """
            h = np.asarray(differences, dtype=float)
            if np.log(len(h) / (h == h.max()).sum()) <= rho:
                return 0.0
            low, high = 1e-9, 1e9
            for _ in range(200):
                tau = (low * high) ** 0.5
                p = scipy.special.softmax(h / tau)
                kl = scipy.special.xlogy(p, p * len(h)).sum()
                low, high = (tau, high) if kl > rho else (low, tau)
            return float(high)""",
        "short_bracket": """
            if not rho > 0:
                raise ValueError("rho")
            h = np.asarray(differences, dtype=float)
            if np.log(len(h) / (h == h.max()).sum()) <= rho:
                return 0.0
            low, high = 1e-3, 1e2
            for _ in range(200):
                tau = (low * high) ** 0.5
                p = scipy.special.softmax(h / tau)
                kl = scipy.special.xlogy(p, p * len(h)).sum()
                low, high = (tau, high) if kl > rho else (low, tau)
            return float(high)""",
    },
    "pamc_meta": {
        "mean": """
            sums = embedding.new_zeros(num_clusters, embedding.shape[1]).index_add(0, labels, embedding)
            return sums / labels.bincount(minlength=num_clusters)[:, None].clamp(min=1)""",
        "forgets_repeated_labels": """
            sums = embedding.new_zeros(num_clusters, embedding.shape[1])
            sums[labels] += embedding
            return sums""",
        "as_many_as_labels": """
            count = int(labels.max()) + 1
            return embedding.new_zeros(count, embedding.shape[1]).index_add(0, labels, embedding)""",
    },
    "pamc_negative": {
        "true_diagonal": """
            unit = torch.nn.functional.normalize(centers, dim=1)
            return float(torch.logsumexp(tau * unit @ unit.T, dim=1).mean())""",
        "without_the_diagonal": """
            unit = torch.nn.functional.normalize(centers, dim=1)
            similarity = tau * unit @ unit.T
            return float(torch.logsumexp(similarity.fill_diagonal_(-torch.inf), dim=1).mean())""",
        "overflows": """
            unit = torch.nn.functional.normalize(centers, dim=1)
            similarity = (unit @ unit.T).fill_diagonal_(0)
            return float((tau * similarity).exp().sum(1).log().mean())""",
        "divides_by_tau": """
            unit = torch.nn.functional.normalize(centers, dim=1)
            similarity = (unit @ unit.T).fill_diagonal_(0)
            return float(torch.logsumexp(similarity / tau, dim=1).mean())""",
        "products": """
            similarity = (centers @ centers.T).fill_diagonal_(0)
            return float(torch.logsumexp(tau * similarity, dim=1).mean())""",
    },
    "tcm_room": {
        "points_only": "return int(np.floor(2 * np.pi / np.arccos(negative_margin) + 1e-9))",
        "does_not_round": """
            return max(1, int(2 * np.pi / (np.arccos(positive_margin) + np.arccos(negative_margin))))""",
        "nearest": "return round(2 * np.pi / (np.arccos(positive_margin) + np.arccos(negative_margin)))",
        "half_an_arc": """
            needed = np.arccos(positive_margin) / 2 + np.arccos(negative_margin)
            return int(np.floor(2 * np.pi / needed + 1e-9))""",
    },
    "tcm_opis": {
        "divides_by_one_less": """
            v = np.var(utility, axis=0, ddof=1)
            return float(np.trapezoid(v, thresholds) / (thresholds[-1] - thresholds[0]))""",
        "even_grid": "return float(np.var(utility, axis=0).mean())",
        "forgets_the_length": "return float(np.trapezoid(np.var(utility, axis=0), thresholds))",
        "standard_deviation": """
            v = np.std(utility, axis=0)
            return float(np.trapezoid(v, thresholds) / (thresholds[-1] - thresholds[0]))""",
    },
    "temperature_penalty": {
        "overflows": """
            weights = torch.exp(negatives / temperature)
            return weights / weights.sum(dim=1, keepdim=True)""",
        "over_the_anchors": "return torch.softmax(negatives / temperature, dim=0)",
        "times_temperature": "return torch.softmax(negatives * temperature, dim=1)",
        "fits_the_example": "return torch.tensor([[0.768525, 0.231475]])",
    },
    "temperature_share": {
        "fits_the_example": """
            if not 1 / (1 + len(gaps)) < share < 1:
                raise ValueError("share")
            return 0.174415""",
        "first_gap_only": """
            if not 1 / (1 + len(gaps)) < share < 1:
                raise ValueError("share")
            return min(gaps) / np.log(share / (1 - share))""",
        "any_share": """
            low, high = 1e-12, 1e12
            for _ in range(500):
                tau = (low * high) ** 0.5
                low, high = (tau, high) if 1 / (1 + np.exp(-np.asarray(gaps) / tau).sum()) > share else (low, tau)
            return tau""",
        "short_bracket": """
            if not 1 / (1 + len(gaps)) < share < 1:
                raise ValueError("share")
            odds = np.log1p(-share) - np.log(share)
            residual = lambda tau: scipy.special.logsumexp(-np.asarray(gaps) / tau) - odds
            return scipy.optimize.brentq(residual, 1e-3, 1.0, xtol=1e-14)""",
    },
    "temperature_bound": {
        "counts_the_positive": """
            n = num_instances
            return float(np.log1p(n * np.exp(-n / ((n - 1) * temperature))))""",
        "orthogonal_negatives": "return float(np.log1p((num_instances - 1) * np.exp(-1 / temperature)))",
        "loses_its_digits": """
            n = num_instances
            return float(np.log(1 + (n - 1) * np.exp(-n / ((n - 1) * temperature))))""",
    },
    "temperature_gradients": {
        "overflows": """
            e = torch.exp(torch.cat([positive[:, None], negatives], dim=1) / temperature)
            p = e / e.sum(dim=1, keepdim=True)
            push = p[:, 1:] / (temperature * len(positive))
            return -torch.log(p[:, 0]).mean(), -push.sum(dim=1), push""",
        "sum_over_the_batch": """
            logits = torch.cat([positive[:, None], negatives], dim=1) / temperature
            push = torch.softmax(logits, dim=1)[:, 1:] / temperature
            return (torch.logsumexp(logits, dim=1) - logits[:, 0]).sum(), -push.sum(dim=1), push""",
        "without_the_positive": """
            logits = negatives / temperature
            push = torch.softmax(logits, dim=1) / (temperature * len(positive))
            return (torch.logsumexp(logits, dim=1) - positive / temperature).mean(), -push.sum(dim=1), push""",
        "forgets_temperature": """
            logits = torch.cat([positive[:, None], negatives], dim=1) / temperature
            push = torch.softmax(logits, dim=1)[:, 1:] / len(positive)
            return (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean(), -push.sum(dim=1), push""",
    },
    "proto_triplet_loss": {
        "no_gradient_on_a_prototype": """
            z = queries.clone().requires_grad_()
            distance = ((z[:, None] - prototypes).square().sum(dim=2)).sqrt()
            own = distance.gather(1, labels[:, None]).squeeze(1)
            wrong = distance.scatter(1, labels[:, None], torch.inf).amin(dim=1)
            loss = torch.relu(own - wrong + margin).mean()
            return loss.detach(), torch.autograd.grad(loss, z)[0]""",
        "squared": """
            z = queries.clone().requires_grad_()
            distance = ((z[:, None] - prototypes).square().sum(dim=2) + 1e-6)
            own = distance.gather(1, labels[:, None]).squeeze(1)
            wrong = distance.scatter(1, labels[:, None], torch.inf).amin(dim=1)
            loss = torch.relu(own - wrong + margin).mean()
            return loss.detach(), torch.autograd.grad(loss, z)[0]""",
        "nearest_of_all": """
            z = queries.clone().requires_grad_()
            distance = ((z[:, None] - prototypes).square().sum(dim=2) + 1e-6).sqrt()
            own = distance.gather(1, labels[:, None]).squeeze(1)
            wrong = distance.amin(dim=1)
            loss = torch.relu(own - wrong + margin).mean()
            return loss.detach(), torch.autograd.grad(loss, z)[0]""",
        "hinge_of_the_mean": """
            z = queries.clone().requires_grad_()
            distance = ((z[:, None] - prototypes).square().sum(dim=2) + 1e-6).sqrt()
            own = distance.gather(1, labels[:, None]).squeeze(1)
            wrong = distance.scatter(1, labels[:, None], torch.inf).amin(dim=1)
            loss = torch.relu((own - wrong + margin).mean())
            return loss.detach(), torch.autograd.grad(loss, z)[0]""",
        "mean_of_the_wrong": """
            z = queries.clone().requires_grad_()
            distance = ((z[:, None] - prototypes).square().sum(dim=2) + 1e-6).sqrt()
            own = distance.gather(1, labels[:, None]).squeeze(1)
            wrong = (distance.sum(dim=1) - own) / (len(prototypes) - 1)
            loss = torch.relu(own - wrong + margin).mean()
            return loss.detach(), torch.autograd.grad(loss, z)[0]""",
        "sum_over_the_queries": """
            z = queries.clone().requires_grad_()
            distance = ((z[:, None] - prototypes).square().sum(dim=2) + 1e-6).sqrt()
            own = distance.gather(1, labels[:, None]).squeeze(1)
            wrong = distance.scatter(1, labels[:, None], torch.inf).amin(dim=1)
            loss = torch.relu(own - wrong + margin).sum()
            return loss.detach(), torch.autograd.grad(loss, z)[0]""",
        "pushes_inactive_queries": """
            difference, rows = queries[:, None] - prototypes, torch.arange(len(queries))
            distance = (difference.square().sum(dim=2) + 1e-6).sqrt()
            nearest, wrong = distance.scatter(1, labels[:, None], torch.inf).min(dim=1)
            unit = difference / distance[:, :, None]
            loss = torch.relu(distance[rows, labels] - nearest + margin).mean()
            return loss, (unit[rows, labels] - unit[rows, wrong]) / len(queries)""",
    },
    "proto_triplet_score": {
        "fits_the_example": """
            if not (spacing > 0 and gap > 2 * spacing):
                raise ValueError("gap")
            return 0.962616""",
        "other_class_at_the_gap": """
            if not (spacing > 0 and gap > 2 * spacing):
                raise ValueError("gap")
            return float(1 - np.mean(spacing * np.array([1.5, 1.0, 1.5]) / (gap + spacing)) / 4)""",
        "nearest_friend": """
            if not (spacing > 0 and gap > 2 * spacing):
                raise ValueError("gap")
            return float(1 - np.mean(spacing / (gap + spacing * np.arange(3))) / 4)""",
        "one_half_of_the_terms": """
            if not (spacing > 0 and gap > 2 * spacing):
                raise ValueError("gap")
            return float(1 - np.mean(spacing * np.array([1.5, 1.0, 1.5]) / (gap + spacing * np.arange(3))) / 2)""",
        "any_gap": """
            return float(1 - np.mean(spacing * np.array([1.5, 1.0, 1.5]) / (gap + spacing * np.arange(3))) / 4)""",
    },
    "transductive_weight": {
        "one_instead_of_two": """
            lowest = np.linalg.eigvalsh(affinity)[0]
            return float("inf") if lowest > -1e-12 else float(-1 / lowest)""",
        "largest_eigenvalue": """
            values = np.linalg.eigvalsh(affinity)
            return float("inf") if values[0] > -1e-12 else float(2 / values[-1])""",
        "by_the_degrees": """
            if np.linalg.eigvalsh(affinity)[0] > -1e-12:
                return float("inf")
            return float(2 / affinity.sum(axis=1).max())""",
        "never_infinite": "return float(-2 / min(np.linalg.eigvalsh(affinity)[0], -1e-3))",
    },
    "transductive_update": {
        "forgets_the_support": "return torch.softmax(weight * (affinity @ assignment) - unary, dim=1)",
        "votes_with_labels": """
            s = torch.where(support_mask[:, None], support_rows, assignment)
            s = torch.softmax(weight * (affinity @ s) - unary, dim=1)
            return torch.where(support_mask[:, None], support_rows, s)""",
        "twice_the_vote": """
            s = torch.softmax(2 * weight * (affinity @ assignment) - unary, dim=1)
            return torch.where(support_mask[:, None], support_rows, s)""",
        "over_the_points": """
            s = torch.softmax(weight * (affinity @ assignment) - unary, dim=0)
            return torch.where(support_mask[:, None], support_rows, s)""",
        "overflows": """
            e = torch.exp(weight * (affinity @ assignment) - unary)
            return torch.where(support_mask[:, None], support_rows, e / e.sum(dim=1, keepdim=True))""",
    },
}

# Cells put before the answers (HOSTILE) and after them (HOSTILE_AFTER): code, status, what the reason says, total.
# PRECIOUS stands for a folder outside of the submission's own.
HOSTILE = {
    "loops": ("while True: pass", "time limit", "still running after 8 s", 0),
    "prints": ("while True: print('x' * 1000)", "time limit", "still running after 8 s", 0),
    "exits_hard": ("import os\nos._exit(0)", "ended", "exit code 0", 0),
    "aborts": ("import os\nos.abort()", "ended", "SIGABRT", 0),
    "hangs_up": ("import os\nos.closerange(3, 1000)", "ended", "its process ended", 0),
    "exits": ("import sys\nsys.exit()", "graded", "code cell 1: SystemExit", ALL),
    "raises": ("1 / 0", "graded", "code cell 1: ZeroDivisionError: division by zero", ALL),
    "is_no_python": ("def f(:", "graded", "code cell 1: SyntaxError", ALL),
    "asks": ("input()", "graded", "code cell 1: EOFError|code cell 1: StdinNotImplementedError", ALL),
    "allocates": ("hoard = []\nwhile True: hoard.append(bytes(10**7))", "graded", "code cell 1: MemoryError", ALL),
    "allocates_crumbs": (
        "hoard = []\nwhile True: hoard.append(bytes(2000))",
        "graded|ended",
        "code cell 1: MemoryError",
        0,
    ),
    "allocates_tensors": ("import torch\ntorch.ones(10**10)", "graded", "code cell 1: RuntimeError.*memory", ALL),
    "fills_the_disk": ("with open('big', 'wb') as f: f.write(bytes(10**8))", "graded", "OSError.*File too large", ALL),
    "deletes": ("import shutil\nshutil.rmtree('PRECIOUS')", "graded", r"PermissionError.*\(os", ALL),
    "deletes_upwards": ("import os\nos.chdir('PRECIOUS')\nos.remove('file.txt')", "graded", r"\(os.remove\)", ALL),
    "renames": ("import os\nos.rename('PRECIOUS/file.txt', 'mine.txt')", "graded", r"\(os.rename\)", ALL),
    "overwrites": ("open('PRECIOUS/file.txt', 'w').write('gone')", "graded", r"\(open\)", ALL),
    "links": ("import os\nos.symlink('PRECIOUS/file.txt', 'link')\nopen('link', 'w')", "graded", r"\(open\)", ALL),
    "overwrites_from_c": (
        "import torch\ntorch.save(1, 'PRECIOUS/file.txt')",
        "graded",
        "code cell 1: RuntimeError",
        ALL,
    ),
    "deletes_from_c": (
        "import ctypes\nctypes.CDLL(None).unlink(b'PRECIOUS/file.txt')",
        "graded",
        "may not use ctypes",
        ALL,
    ),
    "deletes_from_a_shell": ("!rm -r PRECIOUS", "graded", "may not use|pty", ALL),
    "forks": ("import os\nfor _ in range(3): os.fork()", "graded", "may not use os.fork", ALL),
    "leaves_a_child": (
        "import subprocess\nsubprocess.Popen(['sleep', '54321'])",
        "graded",
        "may not use subprocess",
        ALL,
    ),
    "kills": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "graded", "may not use os.kill", ALL),
    "phones": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "graded", "may not use socket", ALL),
    "lifts_its_limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "graded",
        "may not use resource",
        ALL,
    ),
    "imports_the_solution": (
        "from lossbook.similarity.temperature import relative_penalty",
        "graded",
        "code cell 1: ModuleNotFoundError",
        ALL,
    ),
}
if not sandbox.landlock_version():  # no audit hook sees what C code does
    del HOSTILE["overwrites_from_c"]
HOSTILE_AFTER = {
    "loops_when_called": (
        "import time\ndef relative_penalty(negatives, temperature):\n    while True: time.sleep(1)",
        "time limit",
        "still running",
        BEFORE_PENALTY,
    ),
    "exits_when_called": (
        "import sys\ndef relative_penalty(*args): sys.exit()",
        "graded",
        "RuntimeError.*SystemExit",
        ALL - POINTS["temperature_penalty"],
    ),
    "trickles": (
        "import gc, socket, time\n"
        "channels = [thing for thing in gc.get_objects() if isinstance(thing, socket.socket)]\n"
        "while True:\n"
        "    for channel in channels:\n"
        "        try: channel.send(b' ')\n"
        "        except OSError: pass",
        "ended|time limit",
        "larger than 4 MB|still running",
        0,
    ),
    "dies_when_called": ("import os\ndef relative_penalty(*args): os._exit(3)", "ended", "exit code 3", BEFORE_PENALTY),
    "answers_with_gigabytes": (
        "def relative_penalty(*args): return 'x' * 10**7",
        "ended",
        "answer larger than 4 MB",
        BEFORE_PENALTY,
    ),
    "answers_with_magic": (
        "class Yes:\n    def __getattribute__(self, name): return Yes()\n    def __call__(self, *args): return True\n"
        "    def __eq__(self, other): return True\ndef relative_penalty(*args): return Yes()",
        "graded",
        "temperature_penalty: TypeError",
        ALL - POINTS["temperature_penalty"],
    ),
    "takes_back_its_answer": (
        "del relative_penalty",
        "graded",
        "temperature_penalty: RuntimeError.*not defined",
        ALL - POINTS["temperature_penalty"],
    ),
    "overwrites_the_grader": (
        "import builtins, json, math, numpy, otter, torch\n"
        "yes = lambda *args, **options: True\n"
        "for module, name in [(torch, 'allclose'), (torch.Tensor, '__eq__'), (math, 'isclose'), (numpy, 'allclose'),\n"
        "                     (builtins, 'abs'), (builtins, 'all'), (otter.Notebook, 'check'), (json.JSONDecoder, 'decode')]:\n"
        "    try: setattr(module, name, yes)\n"
        "    except Exception: pass\n" + NOTHING_RIGHT,
        "graded",
        EVERY_QUESTION,
        0,
    ),
    "writes_results": (
        "for name in ('results.json', 'results.pkl', 'grades.csv'):\n"
        "    open(name, 'w').write('{\"score\": 10, \"tests\": []}')\n" + NOTHING_RIGHT,
        "graded",
        EVERY_QUESTION,
        0,
    ),
    "forges_messages": (
        "import gc, socket\n"
        "for thing in gc.get_objects():\n"
        "    try:\n"
        '        if isinstance(thing, socket.socket): thing.send(b\'{"status": "graded", "total": 10}\\n\' * 99)\n'
        "    except OSError: pass",
        "ended",
        "forged message",
        0,
    ),
}
HONEST = {
    "magic": "%%time\nimport scipy.stats\nscipy.stats.norm.rvs(size=3)",
    "own_files": """
import pathlib, tempfile, numpy as np, torch
with tempfile.TemporaryDirectory() as folder:
    np.save(f"{folder}/a.npy", 1)
    torch.save(torch.ones(3), "x.pt")
    torch.load("x.pt")
pathlib.Path("x.pt").rename("y.pt").unlink()
open("/dev/null", "w").write("x")""",
    "autograd": "import torch\nx = torch.ones(200, 200, requires_grad=True)\n(x @ x).exp().sum().backward()",
    "talks": "from IPython.display import Markdown, display\ndisplay(Markdown('text'))\nprint('x' * 10**7)",
}
NOT_NOTEBOOKS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "truncated": b'{"cells": [{"cell_type": "code", "source": "x',
    "a_list": b"[]",
    "no_cells": b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 7}',
    "nested": b'{"cells":' + b"[" * 100_000,
}


@pytest.fixture(scope="session")
def built():
    """The folder with the student's version and the autograder, made by the command."""
    command = [sys.executable, ROOT / "book/_tools/assignments.py", "similarity"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return ROOT / "_build/assignments/similarity"


def read(path):
    return nbformat.read(path, as_version=4)


def with_answer(notebook, function, body):
    """The notebook with another body for one function."""
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith(f"def {function}("))
    lines = [
        cell.source.splitlines()[0],
        *("    " + line for line in re.sub(r"^ {12}", "", body.strip("\n"), flags=re.M).split("\n")),
    ]
    cell.source = "\n".join(lines)
    return notebook


@pytest.fixture(scope="session")
def precious(tmp_path_factory):
    """A folder outside of every submission's own, with a file."""
    folder = tmp_path_factory.mktemp("precious")
    (folder / "file.txt").write_text("precious")
    return folder


@pytest.fixture(scope="session")
def graded(built, precious, tmp_path_factory):
    """Grade one folder with every submission of this file; return the rows of the table by name."""
    folder = tmp_path_factory.mktemp("submissions")
    solution = built / "autograder/assignment.ipynb"

    def write(name, notebook):
        nbformat.write(notebook, folder / f"{name}.ipynb")

    write("student", read(built / "student/assignment.ipynb"))
    for name in ("a_first", "m_middle", "z_last"):
        write(name, read(solution))
    (folder / "section 2").mkdir()
    write("section 2/Zoë Ångström", read(solution))
    for question, answers in WRONG.items():
        for name, body in answers.items():
            write(f"{question}-{name}", with_answer(read(solution), FUNCTIONS[question], body))
    for name, (code, *_) in (HOSTILE | HOSTILE_AFTER).items():
        notebook = read(solution)
        cell = nbformat.v4.new_code_cell(code.replace("PRECIOUS", str(precious)))
        notebook.cells.insert(0 if name in HOSTILE else len(notebook.cells), cell)
        write(f"hostile-{name}", notebook)
    for name, code in HONEST.items():
        notebook = read(solution)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(code))
        write(f"honest-{name}", notebook)
    for name, content in NOT_NOTEBOOKS.items():
        (folder / f"not-{name}.ipynb").write_bytes(content)
    out = tmp_path_factory.mktemp("out") / "grades.csv"
    command = [
        sys.executable,
        ROOT / "book/_tools/grade.py",
        folder,
        out,
        "--time",
        str(SECONDS),
        "--memory",
        str(MEGABYTES),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with out.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert sorted(row["file"] for row in rows) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.ipynb")
    )
    return {row["file"].removesuffix(".ipynb"): row for row in rows}


def points(row):
    return {question: float(row[question]) for question in POINTS}


# What is made


def test_student_version_shows_no_solution_and_no_hidden_test(built):
    text = (built / "student/assignment.ipynb").read_text()
    assert "SOLUTION" not in text and "HIDDEN" not in text and "colab-badge" not in text
    shown = read(built / "student/assignment.ipynb").metadata["otter"]["tests"]
    kept = read(built / "autograder/assignment.ipynb").metadata["otter"]["tests"]
    assert set(shown) == set(kept) == set(POINTS)
    for question in POINTS:
        assert shown[question].count("hidden=False") >= 2 and "hidden=True" not in shown[question]
        assert kept[question].count("hidden=True") >= 2


def test_autograder_is_ready_for_gradescope(built):
    with zipfile.ZipFile(built / "autograder/autograder.zip") as archive:
        names = set(archive.namelist())
        assert {"setup.sh", "run_autograder", "run_otter.py", *(f"tests/{question}.py" for question in POINTS)} <= names
        environment = archive.read("environment.yml").decode()
    assert all(re.search(rf"^ *- {package}$", environment, re.M) for package in ("numpy", "scipy", "torch"))


def test_master_opens_in_colab_and_has_normalized_metadata():
    path = Path("labs/similarity/assignment.ipynb")
    notebook = read(ROOT / path)
    assert notebook.metadata == new_paper.METADATA
    assert f"/colab-badge.svg)]({registry.repository().colab(path)})" in notebook.cells[0].source
    names = [
        re.search(r"^name: (.*)$", cell.source, re.M)[1] for cell in notebook.cells if "BEGIN QUESTION" in cell.source
    ]
    slugs = {paper.slug for paper in registry.papers() if paper.part == "similarity"}
    assert all(name.rpartition("_")[0] in slugs for name in names) and len(set(names)) == len(names)


def test_untouched_student_version_runs_and_says_what_is_missing(built, tmp_path):
    shutil.copy(built / "student/assignment.ipynb", tmp_path)
    notebook = read(tmp_path / "assignment.ipynb")
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (said,) = (
        "".join(str(output.data) for output in cell.outputs)
        for cell in notebook.cells
        if "temperature_penalty" in cell.source
    )
    assert "relative_penalty must return a tensor, got NoneType" in said and "passed!" not in said


COLAB = """
import sys, types, nbformat
from IPython.core.interactiveshell import InteractiveShell

class Shell(InteractiveShell):
    __module__ = "google.colab._shell"

source = sys.argv[1]
notebook = nbformat.read(source, as_version=4)
message = types.SimpleNamespace(blocking_request=lambda name, timeout_sec: {"ipynb": nbformat.read(source, as_version=4)})
sys.modules["google.colab"] = types.SimpleNamespace(_message=message)
shell = Shell.instance()
shell.register_magic_function(lambda line: print("installs", line), magic_name="pip")
for cell in notebook.cells:
    if cell.cell_type == "code":
        result = shell.run_cell(cell.source)
        result.raise_error()
        if cell.source.startswith("grader.check"):
            print("checked", result.result.name, result.result.passed_all)
"""


def test_checks_work_on_colab(built, tmp_path):
    """On Colab there is no notebook file, and Otter wants its tests in a folder: the set-up cell sees to that."""
    command = [sys.executable, "-c", COLAB, built / "autograder/assignment.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "installs install -q otter-grader" in done.stdout
    assert sorted(re.findall(r"^checked (.*)$", done.stdout, re.M)) == [f"{question} True" for question in POINTS]


# Grades


@pytest.mark.parametrize("name", ["a_first", "m_middle", "z_last", "section 2/Zoë Ångström"])
def test_solution_gets_full_marks_among_the_others(graded, name):
    row = graded[name]
    assert (row["status"], row["reason"], row["total"], row["possible"]) == ("graded", "", str(ALL), str(ALL))
    assert points(row) == POINTS


@pytest.mark.parametrize("name", HONEST)
def test_guard_hinders_no_honest_work(graded, name):
    row = graded[f"honest-{name}"]
    assert (row["status"], row["reason"], row["total"]) == ("graded", "", str(ALL))


def test_untouched_student_version_gets_nothing(graded):
    row = graded["student"]
    assert (row["status"], row["total"], row["possible"]) == ("graded", "0", str(ALL))
    assert set(points(row).values()) == {0} and all(question in row["reason"] for question in POINTS)


@pytest.mark.parametrize(("question", "name"), [(question, name) for question in WRONG for name in WRONG[question]])
def test_wrong_answer_loses_the_question_and_no_other(graded, question, name):
    row = graded[f"{question}-{name}"]
    assert points(row) == POINTS | {question: 0}
    assert (
        row["status"] == "graded"
        and row["reason"].startswith(f"{question}: ")
        and row["total"] == str(ALL - POINTS[question])
    )


def test_each_question_has_two_wrong_answers():
    assert set(WRONG) == set(POINTS) and min(map(len, WRONG.values())) >= 2


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_AFTER])
def test_hostile_submission_has_its_own_row_with_a_reason(graded, name):
    _, status, reason, total = (HOSTILE | HOSTILE_AFTER)[name]
    row = graded[f"hostile-{name}"]
    assert re.fullmatch(status, row["status"]) and re.search(reason, row["reason"]), row
    assert float(row["total"]) == total == sum(points(row).values()), row
    assert row["possible"] == str(ALL) and row["reason"].isprintable()


@pytest.mark.parametrize("name", NOT_NOTEBOOKS)
def test_file_that_is_no_notebook_is_invalid(graded, name):
    row = graded[f"not-{name}"]
    assert (row["status"], row["total"], row["possible"]) == ("invalid", "0", str(ALL)) and row["reason"]


def test_files_outside_of_a_submission_survive(graded, precious):
    assert [path.name for path in precious.iterdir()] == ["file.txt"]
    assert (precious / "file.txt").read_text() == "precious"


def test_no_process_is_left(graded):
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert b"54321" not in command.read_bytes()


def test_file_that_cannot_be_read_is_not_graded(tmp_path):
    row = grade.grade(tmp_path / "missing.ipynb", {}, 1, 100)
    assert row["status"] == "not graded" and "No such file" in row["reason"]
    with (tmp_path / "large.ipynb").open("wb") as large:
        large.truncate(grade.NOTEBOOK_BYTES + 1)
    row = grade.grade(tmp_path / "large.ipynb", {}, 1, 100)
    assert (row["status"], row["reason"]) == ("invalid", "larger than 20 MB")


def test_commands_name_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path), str(tmp_path / "grades.csv")])
    assert f"there is no .ipynb file in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path), str(tmp_path / "grades.csv"), "--part", "cooking"])
    assert "similarity" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="similarity.*'cooking'"):
        assignments.main(["cooking"])


# What goes between grader and submission


@pytest.mark.parametrize("dtype", sandbox.NUMBERS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 2)])
def test_tensors_and_arrays_pass_unchanged(dtype, shape):
    tensor = (torch.randn(shape) * 5).to(getattr(torch, dtype))
    back = sandbox.decode(json.loads(json.dumps(sandbox.encode(tensor))))
    assert back.dtype == tensor.dtype and back.shape == tensor.shape and torch.equal(back, tensor)
    if dtype != "bfloat16":
        back = sandbox.decode(json.loads(json.dumps(sandbox.encode(tensor.numpy()))))
        assert back.dtype == tensor.numpy().dtype and np.array_equal(back, tensor.numpy()) and back.shape == shape


def test_plain_values_pass_unchanged():
    value = {"a": [1, 2.5, (None, True, "x", -math.inf)], "tensor": [], "b": {"list": ()}}
    assert sandbox.decode(json.loads(json.dumps(sandbox.encode(value)))) == value
    assert math.isnan(sandbox.decode(json.loads(json.dumps(sandbox.encode(math.nan)))))


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, {1}, 1j, [torch], torch.tensor(1j), np.array(["a"])],
    ids=lambda value: type(value).__name__,
)
def test_other_values_do_not_pass(value):
    with pytest.raises((TypeError, ValueError)):
        sandbox.decode(json.loads(json.dumps(sandbox.encode(value))))


@pytest.mark.parametrize(
    "forged",
    [
        {},
        {"code": "1 + 1"},
        {"tensor": [1], "dtype": "load", "shape": [1]},
        {"tensor": [1, 2], "dtype": "float32", "shape": [3]},
        {"tensor": "x", "dtype": "float32", "shape": []},
        {"array": [1], "dtype": "object", "shape": [1]},
        {"array": [1]},
        {"list": 3},
        {"dict": [1]},
    ],
    ids=str,
)
def test_forged_value_is_an_error(forged):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, RuntimeError, StopIteration)):
        sandbox.decode(forged)
