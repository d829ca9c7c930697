"""Bugs that a careful reviewer may miss, each of which the tests have to notice.

None is equivalent to the code that it replaces: each changes a value, a message, what is sent or what is left behind.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug: what replaces a text that stands once in its file, and the tests likely to notice, the best first."""

    name: str
    file: str
    old: str
    new: str
    near: tuple[str, ...]


def _in(file: str, near: tuple[str, ...], *bugs: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, file, old, new, near) for name, old, new in bugs]


LAWS = ("tests/test_laws_closed_forms.py", "tests/test_laws_exactness.py", "tests/test_laws_invariances.py")
GRADIENTS = ("tests/test_laws_gradients.py", "tests/test_laws_exactness.py", "tests/test_gradients.py")
EXTREMES = ("tests/test_contract.py",)
SHARDS = ("tests/distributed/test_exactness.py",)
HEADER = ("tests/distributed/test_header.py", "tests/distributed/test_exactness.py")
NORMS = ("tests/test_normalization.py",)
GLOBAL_NORMS = ("tests/distributed/test_normalization_global.py",)
DIAGNOSTICS = ("tests/test_diagnostics.py", "barlow_loss/diagnostics.py")
COLUMN_KERNELS = ("tests/kernels/interpreted/test_column_kernels.py",)
MATRIX_KERNELS = ("tests/kernels/interpreted/test_matrix_kernels.py",)
LAUNCHES = ("tests/kernels/compiled/test_launches.py",)
CHECKPOINTS = ("tests/examples/test_example_checkpoint.py",)
RESUMED = ("tests/examples/test_example_program.py::test_a_run_resumed_twice_ends_with_the_same_bits",)
ORDER = ("tests/examples/test_example_data.py",)
OPTIMIZATION = ("tests/examples/test_example_optimization.py",)
STEPS = ("tests/examples/test_example_steps.py",)
ABLATIONS = ("tests/examples/test_example_ablations.py",)

LOSS = [
    *_in(
        "barlow_loss/_loss_terms.py",
        LAWS,
        ("off-diagonal-counts-the-diagonal", "off = off - _sum_of_squares(c, plan)", "off = off * 1"),
        ("off-diagonal-rounds-below-zero", "max(off, 0.0)", "off"),
        ("on-diagonal-takes-one-from-the-square", "e = c - plan.diagonal", "e = c * c - plan.diagonal"),
        ("lambda-weights-the-diagonal", "weighted = lambd * off", "weighted = lambd * on"),
    ),
    *_in(
        "barlow_loss/_loss_terms.py",
        ("tests/test_laws_inputs.py",),
        ("clamped-nan-is-zero", "max(off, 0.0)", "max(0.0, off)"),
    ),
    *_in(
        "barlow_loss/_loss_terms.py",
        EXTREMES,
        ("loss-on-the-default-device", "dtype=dtype, device=c.device)", "dtype=dtype)"),
        ("many-features-added-in-float32", "c.numel() > 4096", "False"),
        ("loss-in-double-precision", "weighted = c_float(lambd * off).value", "weighted = lambd * off"),
    ),
    *_in(
        "barlow_loss/_loss_terms.py",
        GRADIENTS,
        ("a-tensor-lambda-weights-the-other", "return on_diagonal + lambd * off", "return lambd * on_diagonal + off"),
    ),
    *_in(
        "barlow_loss/_statistics.py",
        NORMS,
        ("eps-outside-the-root", "torch.rsqrt(v + eps) +", "1 / (v.sqrt() + eps) +"),
        ("variance-unbiased", "moments.m2 / at_least_one(moments.n)", "moments.m2 / at_least_one(moments.n - 1)"),
    ),
    *_in(
        "barlow_loss/_statistics.py",
        NORMS,
        ("infinite-variance-is-a-silent-zero", "torch.rsqrt(v + eps) + 0.0 * v", "torch.rsqrt(v + eps)"),
        (
            "pivot-dropped",
            "(first + (rows - first).contiguous().mean(dim=-2, keepdim=True))",
            "torch.zeros_like(first)",
        ),
        ("pivot-from-the-first-row-alone", "(first + (rows - first).contiguous().mean(dim=-2, keepdim=True))", "first"),
        ("pivot-from-the-first-rows", "* (n - 1) // (_PIVOT_ROWS - 1)", "% max(n, 1)"),
    ),
    *_in(
        "barlow_loss/_statistics.py",
        SHARDS,
        ("chan-correction-forgets-the-count", "shard.m2 + n * m.square()", "shard.m2 + m.square()"),
        ("mean-of-a-shard-rounded-before-its-pivot-goes", "self.pivot - pivot + self.offset", "self.mean - pivot"),
    ),
    *_in(
        "barlow_loss/_dual.py",
        GRADIENTS,
        (
            "dual-projects-with-its-own-gram-matrix",
            "zip(needs_grad, m, each(u), strict=True)",
            "zip(needs_grad, m[::-1], each(u), strict=True)",
        ),
    ),
    *_in(
        "barlow_loss/_gram.py",
        ("tests/test_gradients.py",),
        ("upper-half-of-the-gram-matrix-not-mirrored", "    k[:half, half:] = k[half:, :half].t()\n", ""),
    ),
    *_in(
        "barlow_loss/_primal.py",
        GRADIENTS,
        ("primal-gradient-not-transposed", "(u2, c.t(), rows)", "(u2, c, rows)"),
        ("primal-takes-row-sums-for-both-views", "(u1, c, columns)", "(u1, c, rows)"),
        ("diagonal-of-a-copy-set-to-zero", "correlation.diagonal()", "correlation.diagonal().clone()"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        ("tests/test_gradients.py",),
        (
            "last-block-of-rows-dropped",
            "for start in range(height, n, height)",
            "for start in range(height, n - n % height, height)",
        ),
        ("a-block-counted-twice", "total.add_(part.sum(-2, keepdim))", "total.add_(products.sum(-2, keepdim))"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        LAWS,
        ("eps-not-times-n", "add_(min(n * eps,", "add_(min(eps,"),
        ("variance-about-the-first-row", "x.sub_(s1, alpha=1 / n)", "x.sub_(s1, alpha=0)"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        EXTREMES,
        ("infinite-variance-is-a-silent-zero-in-the-loss", "torch.div(total.sqrt(), total)", "torch.rsqrt(total)"),
        ("float32-under-the-root", "m2.to(dtype).add_(", "m2.add("),
        ("an-eps-too-large-is-nan", "min(n * eps, sys.float_info.max)", "n * eps"),
        ("large-batches-centered-on-their-first-row", "0 < n * d <= _SMALL_ELEMENTS", "n > 0"),
        ("no-pivot", "pivots += (wide(z[:1]),)", "pivots += (wide(z[:1]) * 0,)"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        ("tests/test_float16_products.py", "tests/test_laws_low_precision.py"),
        (
            "16-bit-squares-summed-in-16-bits",
            "return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t",
            "return t",
        ),
    ),
    *_in(
        "barlow_loss/_statistics.py",
        SHARDS,
        ("rho-from-the-rows-of-one-rank", "* shards.total**-0.5", "* max(shard.n, 1) ** -0.5"),
    ),
    *_in(
        "barlow_loss/_function.py",
        ("tests/test_contract.py",),
        ("statistics-under-autocast", "with autocast_disabled(views[0].device.type):", "if True:"),
        ("gradients-under-autocast", "with autocast_disabled(c.device.type):", "if True:"),
    ),
    *_in(
        "barlow_loss/loss.py",
        ("tests/distributed/test_traffic.py", "tests/distributed/test_exactness.py"),
        (
            "auto-decides-by-the-rows-of-one-rank",
            "weights, n, views, target)\n        terms",
            "weights, views[0].shape[0], views, target)\n        terms",
        ),
    ),
]

DEFINITIONS = [
    *_in(
        "barlow_loss/loss.py",
        ("tests/test_laws_target.py",),
        (
            "epsilon-of-the-biased-variance",
            "loss_and_sums(views, lambd, s * eps, plan",
            "loss_and_sums(views, lambd, eps, plan",
        ),
        ("unbiased-off-diagonal-has-the-targets-size", "target / s, 1 / s)", "target, 1 / s)"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        ("tests/test_laws_target.py",),
        (
            "gradient-of-another-diagonal-target",
            "includes_diagonal else a) - of_target",
            "includes_diagonal else a) - a",
        ),
    ),
    *_in(
        "barlow_loss/_plain.py",
        ("tests/test_gradients.py",),
        (
            "plain-dual-keeps-the-diagonal",
            "square = (k[i] * k[j]).sum() - c.square().sum()",
            "square = (k[i] * k[j]).sum()",
        ),
        ("plain-features-not-centered", "    x = z - z.mean(0)\n    x = x - x.mean(0)\n", "    x = z\n"),
    ),
    *_in(
        "barlow_loss/_function.py",
        ("tests/test_gradients.py",),
        ("second-derivative-forgets-lambda", "*found[:4], None", "*found[:3], None, None"),
        ("batched-gradients-reach-the-operation", "elif is_batched(grad_loss, grad_on, grad_off):", "elif False:"),
    ),
]

VIEWS = [
    *_in(
        "barlow_loss/_backends/eager.py",
        ("tests/test_laws_views.py", "tests/test_views.py"),
        ("diagonals-of-pairs-weigh-alike", "weighted = d_pair * weight", "weighted = d_pair"),
        ("norms-of-pairs-counted-twice", "total * 0.5", "total"),
        (
            "mixed-from-what-is-mixed-already",
            "own = torch.stack([k_i[rows] for k_i in k])",
            "own = [k_i[rows] for k_i in k]",
        ),
        ("blocks-of-pairs-counted-twice", "            self.sums.zero_()\n", ""),
        ("blocks-of-pairs-forgotten", "            self.total()\n", ""),
        ("dots-of-a-view-without-its-pairs", "(rows[view], blocks[number])", "(rows[view], rows[view])"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        ("tests/distributed/test_more_views.py",),
        ("dots-of-pairs-weigh-alike", "d[row] * c[row] * plan.weights[i][j]", "d[row] * c[row]"),
    ),
    *_in(
        "barlow_loss/_primal.py",
        ("tests/test_laws_views.py", "tests/test_views.py"),
        ("primal-pairs-weigh-alike", "parts.append(squares * weight)", "parts.append(squares)"),
        ("columns-for-rows-of-the-second-view", "rows if view == i else columns, alpha", "rows, alpha"),
        ("products-of-pairs-weigh-alike", "product.to(p.dtype).mul_(weight)", "product.to(p.dtype)"),
    ),
    *_in(
        "barlow_loss/_target.py",
        ("tests/test_laws_target.py",),
        ("target-without-its-square", " + t * t * d * (d - 1) / processes", ""),
        ("target-of-the-diagonal-too", " - c.sum(dtype=dtype)", ""),
        ("target-without-row-sums", ".sub_(mean.sum(1, keepdim=True))", ""),
    ),
    *_in(
        "barlow_loss/_target.py",
        ("tests/distributed/test_more_views.py",),
        ("target-once-for-each-process", " / processes", ""),
    ),
    *_in(
        "barlow_loss/_primal.py",
        ("tests/test_laws_target.py",),
        ("q-of-what-was-moved", "products = moved * wide", "products = moved.square()"),
    ),
    *_in(
        "barlow_loss/_loss_terms.py",
        ("tests/test_laws_views.py", "tests/test_views.py"),
        ("terms-of-pairs-weigh-alike", "sum(weight * total", "sum(total"),
    ),
    *_in(
        "barlow_loss/_pairs.py",
        ("tests/test_laws_views.py", "tests/test_views.py"),
        ("weights-not-normalised", "total = sum([scaled", "total = 1 or sum([scaled"),
    ),
    *_in(
        "barlow_loss/_report.py",
        ("tests/test_diagnostics.py",),
        ("the-best-pair-is-the-worst", "return max(self, key=badness)", "return min(self, key=badness)"),
    ),
]

AUTOGRAD = [
    *_in(
        "barlow_loss/_function.py",
        SHARDS,
        (
            "gradient-of-what-arrives-on-one-rank",
            "a, b = all_reduce_sum(shards.group, *own)",
            "a, b = own",
        ),
        (
            "gradient-one-over-world-size",
            'if plan.grad_reduction == "sum":',
            'if plan.grad_reduction in ("mean", "sum"):',
        ),
    ),
    *_in(
        "barlow_loss/_function.py",
        GRADIENTS,
        (
            "second-derivative-silently-wrong",
            "_Gradients.apply(grad_loss, grad_on, grad_off, lambd, ctx.eps, first, *views)",
            "_gradients(grad_loss, grad_on, grad_off, lambd, *settings, *saved)",
        ),
        (
            "gradient-of-lambda-forgets-what-arrives",
            "of_lambd = grad_loss * off_diagonal if",
            "of_lambd = off_diagonal.clone() if",
        ),
    ),
    *_in(
        "barlow_loss/_loss_terms.py",
        GRADIENTS,
        ("slope-of-off-times-lambda", "lambd * grad_loss + grad_off", "lambd * (grad_loss + grad_off)"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        GRADIENTS,
        ("diagonal-taken-off-half", "a - b if includes_diagonal else a)", "a - b / 2 if includes_diagonal else a)"),
        ("gradient-along-the-features-forgotten", "q * b + _dots(view, d, c, plan)", "q * b"),
        ("rho-of-the-other-view", "g, of_own[view], rhos[view]", "g, of_own[view], rhos[0]"),
        ("too-large-a-slope-is-refused", "b *= math.inf", "pass"),
    ),
    *_in(
        "barlow_loss/_backends/eager.py",
        SHARDS,
        (
            "backward-writes-over-what-is-saved",
            "wide(left if right is None else torch.mm(left, right)) * b",
            "wide(left if right is None else torch.mm(left, right)).mul_(b)",
        ),
    ),
]

NORMALISATION = [
    *_in(
        "barlow_loss/normalization.py",
        NORMS,
        ("running-variance-biased", "batch.m2 / at_least_one(batch.n - 1)", "batch.m2 / at_least_one(batch.n)"),
        (
            "cumulative-average-counts-one-too-many",
            "self.num_batches_tracked.reciprocal()",
            "(self.num_batches_tracked + 1).reciprocal()",
        ),
        ("one-value-per-channel-passes", "values is not None and values < 2", "values is not None and values < 1"),
        ("convert-forgets-eps", "            old.eps,\n", "            1e-5,\n"),
        ("convert-forgets-eval", "        new.training = old.training\n", ""),
        ("layer-used-twice-is-replaced-once", "named_modules(remove_duplicate=False)", "named_modules()"),
    ),
    *_in(
        "barlow_loss/normalization.py",
        GLOBAL_NORMS,
        ("standardize-ignores-its-group", "float(eps), group)[0]", "float(eps), ALONE)[0]"),
        ("eval-expects-its-peers", "self.process_group) if self.training else ALONE", "self.process_group)"),
    ),
    *_in(
        "barlow_loss/_normalize.py",
        NORMS,
        (
            "16-bit-batches-normalised-in-16-bits",
            "return torch.promote_types(z.dtype, torch.float32)",
            "return z.dtype",
        ),
        ("uncentred-features-in-the-gradient", "- offset * sum_g) * r", ") * r"),
        (
            "second-derivative-with-constant-statistics",
            "if torch.is_grad_enabled():",
            "if torch.is_grad_enabled() and weight is None:",
        ),
    ),
    *_in(
        "barlow_loss/_normalize.py",
        GLOBAL_NORMS,
        (
            "input-gradient-from-the-sums-of-one-rank",
            "all_g, all_gz = all_reduce_sum(ctx.group, sum_g, sum_gz)",
            "all_g, all_gz = sum_g, sum_gz",
        ),
        ("weight-gradient-summed-before-ddp-sums-it", "else sum_gz.to(weight.dtype)", "else all_gz.to(weight.dtype)"),
    ),
]

PROCESSES = [
    *_in(
        "barlow_loss/_waiting.py",
        ("tests/distributed/test_faults.py",),
        ("a-rank-that-waits-is-not-seen", 'store.set(_key(own), "waits")', "pass"),
        ("every-rank-tells-who-is-missing", "if missing and own == min(waiting):", "if missing:"),
        ("a-rank-stays-seen-after-it-has-waited", "store.delete_key(_key(own))", "pass"),
        ("nobody-is-told", "if not done.wait(TOLD_AFTER):", "if False:"),
        (
            "ranks-of-a-group-named-by-their-place",
            "missing = [str(rank) for rank",
            "missing = [str(ranks.index(rank)) for rank",
        ),
        (
            "a-store-that-fails-fails-the-call",
            "watching.start()",
            "(peers.store().set(_key(peers.own), ''), watching.start())",
        ),
        ("a-thread-outlives-its-wait", "        watching.join(ENDED_WITHIN)\n", ""),
    ),
    *_in(
        "barlow_loss/monitoring.py",
        ("tests/distributed/test_monitoring_global.py",),
        ("settings-of-monitors-not-compared", "lambda: (0, must_match))", "lambda: (0, {}))"),
    ),
    *_in(
        "barlow_loss/_module.py",
        ("tests/test_module_habits.py", "tests/distributed/test_wrappers.py"),
        ("a-group-is-copied-with-its-module", ", id(self.process_group): self.process_group", ""),
        ("a-copy-shares-its-tensors", "copy.deepcopy(self.__reduce_ex__(2)[2], memo)", "self.__dict__"),
        ("a-copy-takes-what-a-class-leaves-behind", "self.__reduce_ex__(2)[2]", "self.__dict__"),
    ),
    *_in(
        "barlow_loss/_header.py",
        HEADER,
        ("only-rank-0-is-asked-for-errors", "if any(kinds):", "if kinds[0]:"),
        (
            "claims-of-the-first-and-last-rank-compared",
            "len(set(fingerprints)) > 1",
            "fingerprints[0] != fingerprints[-1]",
        ),
        ("own-count-of-rows-taken-for-all", "return Shards(group, counts)", "return Shards(group, (n,) * group.size)"),
    ),
    *_in(
        "barlow_loss/loss.py",
        HEADER,
        ("eps-not-compared-among-ranks", '        "eps": float(eps),\n', ""),
    ),
    *_in(
        "barlow_loss/_header.py",
        GLOBAL_NORMS,
        ("every-rank-needs-two-samples", "if shards.total >= 2:", "if min(shards.counts) >= 2:"),
    ),
    *_in(
        "barlow_loss/loss.py",
        SHARDS,
        ("synchronize-ignored", "group_of(caller, process_group, synchronize)", "group_of(caller, process_group)"),
    ),
    *_in(
        "barlow_loss/_statistics.py",
        SHARDS,
        (
            "empty-shard-skips-a-collective",
            "all_reduce_max(group, shard.pivot.detach() if shard.n else lowest)",
            "all_reduce_max(group, shard.pivot.detach()) if shard.n else lowest",
        ),
    ),
    *_in(
        "barlow_loss/_collectives.py",
        SHARDS,
        (
            "filled-rows-cut-in-the-order-of-length",
            "zip(parts, counts, strict=True)",
            "zip(parts, sorted(counts), strict=True)",
        ),
        (
            "correlations-added-in-16-bits",
            "matrix.to(torch.promote_types(matrix.dtype, torch.float32))",
            "matrix.clone()",
        ),
        ("sum-over-the-world-in-a-subgroup", "dist.all_reduce(packed, group=group.handle)", "dist.all_reduce(packed)"),
    ),
    *_in(
        "barlow_loss/_collectives.py",
        GLOBAL_NORMS,
        (
            "derivative-of-a-sum-stays-on-its-rank",
            "return all_reduce_sum(ctx.group, grads[0])[0], None",
            "return grads[0], None",
        ),
    ),
    *_in(
        "barlow_loss/_collectives.py",
        ("tests/distributed/test_compiled_steps.py",),
        (
            "uneven-shards-pass-in-a-compiled-graph",
            "size * sums[1] == sums[0].square()",
            "size * sums[1] >= sums[0].square()",
        ),
    ),
]

FACE = [
    *_in(
        "barlow_loss/_validation.py",
        ("tests/test_contract.py",),
        (
            "second-view-not-checked",
            "for name, z in zip(names, views, strict=True):\n        check",
            "for name, z in zip(names[:1], views[:1], strict=True):\n        check",
        ),
        ("third-view-unlike", "z.shape == z1.shape and z.dtype == z1.dtype", "z.shape == z1.shape"),
        ("lambda-may-be-nan", "if not 0 <= value < math.inf:", "if value < 0 or value == math.inf:"),
        ("eps-may-be-true", "if isinstance(eps, bool) or not", "if not"),
    ),
    *_in(
        "barlow_loss/loss.py",
        ("tests/distributed/test_wrappers.py",),
        (
            "module-forgets-grad-reduction",
            "            grad_reduction=self.grad_reduction,\n            pair_weights",
            "            pair_weights",
        ),
    ),
    *_in(
        "barlow_loss/_plan.py",
        ("tests/test_plan.py",),
        ("primal-at-half-the-features", '"dual" if 2 * n <= most', '"dual" if 2 * n < most'),
        ("float16-products-of-any-width", " and d <= _FLOAT16_MAX_FEATURES:", ":"),
        ("asked-for-triton-falls-back", '    if backend == "auto":\n', '    if backend == "auto" or obstacle:\n'),
    ),
    *_in(
        "barlow_loss/_plan.py",
        LAWS,
        (
            "vectors-in-float32",
            'return torch.float32 if device.type == "mps" else torch.float64',
            "return torch.float32",
        ),
    ),
    *_in(
        "barlow_loss/projector.py",
        ("tests/test_projector.py",),
        (
            "hidden-layers-with-a-bias",
            "nn.Linear(width, hidden_features, bias=False)",
            "nn.Linear(width, hidden_features)",
        ),
    ),
    *_in(
        "barlow_loss/_checkpoints.py",
        ("tests/test_projector.py",),
        ("code-in-a-checkpoint-is-run", "weights_only=True)", "weights_only=False)"),
    ),
    *_in(
        "barlow_loss/diagnostics.py",
        DIAGNOSTICS,
        ("noise-floor-over-n", "return d * (d - 1) / (n - 1)", "return d * (d - 1) / n"),
        ("feature-dead-in-both-views-counts-twice", "dead.any(dim=0).sum()", "dead.sum()"),
    ),
    *_in(
        "barlow_loss/_ranks.py",
        ("tests/test_diagnostics.py", "tests/test_ranks.py"),
        ("rank-from-squared-singular-values", "_squares(x).sqrt()", "_squares(x)"),
        ("rounding-counts-as-a-direction", "torch.where(squares > resolution, squares, 0)", "squares.clamp(min=0)"),
        ("within-scatter-over-all-views", "math.sqrt(n * (q - 1))", "math.sqrt(n * q)"),
        ("ridge-of-delta-squared", "math.sqrt(delta) *", "delta *"),
        ("between-scatter-not-centred", "_over(means - means.mean(dim=0), root)", "_over(means, root)"),
        ("rows-never-in-their-span", "if q * n < d:", "if False:"),
        ("power-law-fit-without-weights", "((x * y / k).sum() / (x * x / k).sum())", "((x * y).sum() / (x * x).sum())"),
        ("power-law-range-from-zero", "[first - 1 : min(last, most)]", "[first : min(last, most)]"),
    ),
    *_in(
        "barlow_loss/_ranks.py",
        ("tests/distributed/test_ranks_global.py",),
        ("rank-settings-differ-unnoticed", 'return {"center": center}', "return {}"),
    ),
    *_in(
        "barlow_loss/monitoring.py",
        ("tests/test_monitoring.py",),
        ("validation-counts-as-a-step", "if torch.is_grad_enabled() and _have", "if _have"),
        ("compiled-step-waits", "return may_synchronize(views[0]) and not is_traced(*views)", "return True"),
        ("a-copy-of-a-watched-loss-is-watched", "return _Unwatched, ()", "return _Watch, (self._monitor, self._step)"),
        ("a-step-counts-twice", "if now is not None and now != self._last:", "if now is not None:"),
        ("settings-of-the-monitor-win", "self._settings | _settings(loss_fn)", "_settings(loss_fn) | self._settings"),
        ("a-good-report-forgives-nothing", "self._bad + 1 if reason else 0", "self._bad + 1 if reason else self._bad"),
        ("first-steps-are-judged", "if step < self.after:", "if False:"),
    ),
    *_in(
        "barlow_loss/monitoring.py",
        ("tests/distributed/test_monitoring_global.py",),
        ("every-process-logs", "if is_first(group):", "if group:"),
        ("a-gate-speaks-for-its-process", "if group.size == 1 or not any(", "if group.size or not any("),
    ),
    *_in(
        "barlow_loss/_report.py",
        DIAGNOSTICS,
        ("attainable-rank-without-the-centring", "min(self.n - 1, self.d)", "min(self.n, self.d)"),
    ),
]

KERNELS = [
    *_in(
        "barlow_loss/_backends/triton/_standardize.py",
        COLUMN_KERNELS,
        ("rows-below-the-batch-in-the-sums", "return tl.where((rows < n)[:, None], x, 0.0)", "return x"),
        ("maximum-drops-nan", "tl.where(m2 < 0, 0.0, m2) / n", "tl.maximum(m2, 0.0) / n"),
        ("row-offsets-in-32-bits", "offsets = rows.to(tl.int64)[:, None]", "offsets = rows[:, None]"),
        (
            "padding-not-zero",
            "tl.where(inside, x * scale[None, :] + shift[None, :], 0.0)",
            "x * scale[None, :] + shift[None, :]",
        ),
        ("padding-rows-not-written", "inside = (rows < u_rows)[:, None]", "inside = (rows < n)[:, None]"),
        (
            "diagonal-from-the-rounded-features",
            "c += u1 * u2",
            "c += u1.to(u.dtype.element_ty).to(COMPUTE) * u2.to(u.dtype.element_ty).to(COMPUTE)",
        ),
    ),
    *_in(
        "barlow_loss/_backends/triton/_frobenius.py",
        MATRIX_KERNELS,
        (
            "mask-missing-at-the-last-block",
            "tl.load(a + index, mask=index < elements, other=0.0)",
            "tl.load(a + index)",
        ),
    ),
    *_in(
        "barlow_loss/_backends/triton/_loss_terms.py",
        MATRIX_KERNELS,
        (
            "features-beyond-the-last-one-cost-one-each",
            "tl.where(index < d, (c_ii - target) * (c_ii - target), 0.0)",
            "(c_ii - target) * (c_ii - target)",
        ),
    ),
    *_in(
        "barlow_loss/_backends/triton/_input_gradients.py",
        COLUMN_KERNELS,
        (
            "gradients-stored-below-the-batch",
            "gradient.to(dz.dtype.element_ty), mask=inside)",
            "gradient.to(dz.dtype.element_ty), mask=(cols < d)[None, :])",
        ),
        ("dots-of-the-last-tile-alone", "dots1 += x1 *", "dots1 = x1 *"),
        ("second-view-at-an-offset-in-32-bits", "u + tl.cast(u_rows, tl.int64) * u_cols", "u + u_rows * u_cols"),
        ("gradient-of-off-taken-for-that-of-on", "a = arrived + _given(grad_on)", "a = arrived + _given(grad_off)"),
    ),
    *_in(
        "barlow_loss/_backends/triton/_loss_terms.py",
        LAUNCHES,
        ("compiled-anew-for-every-lambda", "d, n_parts, lambd: tl.float64,", "d, n_parts, lambd: tl.constexpr,"),
        ("cache-forgets-where-lambda-lies", "*alignments(parts, weight)", "weight is None"),
    ),
    *_in(
        "barlow_loss/_backends/triton/_input_gradients.py",
        LAUNCHES,
        ("a-saved-tensor-taken-for-aligned", "*alignments(*tensors[:-2])", "*alignments(*tensors[:4], *tensors[7:-2])"),
        ("compiled-anew-for-every-batch-size", "    n, d, p_cols, u_rows,", "    n: tl.constexpr, d, p_cols, u_rows,"),
    ),
    *_in(
        "barlow_loss/_backends/triton/_launch.py",
        LAUNCHES,
        ("launched-on-the-current-device", "with torch.accelerator.device_index(device):", "if True:"),
        ("an-operation-hidden-from-modes", "is_traced(of) or _modes()", "is_traced(of)"),
        ("an-unknown-triton-is-trusted", "triton.__version__.startswith(self.KNOWN)", "True"),
        ("kernels-found-anew-in-every-step", "self._compiled[device, key] = compiled", "pass"),
    ),
]

EXAMPLE_CHECKPOINT = [
    *_in(
        "examples/barlow_recipes/checkpoint.py",
        CHECKPOINTS,
        (
            "checksum-not-compared",
            "if hashlib.sha256(archive).hexdigest().encode() != comment[len(LABEL) :]:",
            "if len(comment) != COMMENT:",
        ),
        (
            "settings-of-one-side-not-compared",
            "sorted(saved.keys() | current.keys())",
            "sorted(saved.keys() & current.keys())",
        ),
    ),
    *_in(
        "examples/barlow_recipes/outputs.py",
        CHECKPOINTS,
        ("checkpoint-not-synced-to-the-disk", "            _sync(temporary)\n", ""),
        ("generation-before-not-kept", "if keep and path.exists():", "if keep and keep.exists():"),
        ("half-a-file-left-on-a-full-disk", "temporary.unlink(missing_ok=True)", "pass"),
    ),
    *_in(
        "examples/barlow_recipes/checkpoint.py",
        RESUMED,
        ("schedule-begins-anew-on-resume", '        self.schedule.load_state_dict(state["schedule"])\n', ""),
    ),
]

EXAMPLE_IMAGES = [
    *_in(
        "examples/barlow_recipes/data.py",
        ORDER,
        ("one-order-of-images-for-all-epochs", "seed_of(self.seed, self.epoch)", "seed_of(self.seed, 0)"),
        (
            "resume-one-step-off",
            "range(self.first_step, len(self))",
            "range(self.first_step + (self.first_step > 0), len(self))",
        ),
    ),
    *_in(
        "examples/barlow_recipes/images.py",
        ORDER,
        (
            "unreadable-image-replaced-at-random",
            "(index + failures) % len(self.images)",
            "int(torch.randint(len(self.images), ())) if failures else index",
        ),
        ("both-views-from-one-seed", "seed_of(self.seed, epoch, index, number)", "seed_of(self.seed, epoch, index)"),
        ("held-out-images-pretrained-on", "images.subset((~held_out).nonzero()[:, 0])", "images"),
    ),
    *_in(
        "examples/barlow_recipes/files.py",
        ("tests/examples/test_example_shards.py",),
        ("images-in-the-order-of-the-archive", "entries = sorted(entry", "entries = list(entry"),
        (
            "shard-that-was-cut-off-passes",
            "if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):",
            'if file.read(tarfile.BLOCKSIZE).strip(b"\\0"):',
        ),
    ),
    *_in(
        "examples/barlow_recipes/views.py",
        ("tests/examples/test_example_views.py",),
        (
            "contrast-around-the-grey-of-the-batch",
            "images.mean(dim=(-2, -1), keepdim=True)",
            "images.mean(dim=(0, -2, -1), keepdim=True)",
        ),
        ("blur-of-four-deviations", "math.ceil(6 * sigma", "math.ceil(4 * sigma"),
    ),
    *_in(
        "examples/barlow_recipes/pixels.py",
        ("tests/examples/test_example_data.py",),
        ("planes-of-other-files-are-black", "if None not in pages:", "if pages:"),
    ),
]

EXAMPLE_STEPS = [
    *_in(
        "examples/barlow_recipes/optimization.py",
        OPTIMIZATION,
        ("zeros-never-move", "torch.where((p_norm > 0) & (d_norm > 0), q, 1.0)", "torch.where(d_norm > 0, q, 1.0)"),
    ),
    *_in(
        "examples/barlow_recipes/optimization.py",
        OPTIMIZATION,
        ("what-a-model-names-decays", 'callable(getattr(part, "no_weight_decay", None))', "False"),
        ("biases-decay", 'lr_biases, "weight_decay": 0.0', 'lr_biases, "weight_decay": weight_decay'),
        ("warm-up-a-step-early", "return step / warmup_steps", "return (step + 1) / warmup_steps"),
    ),
    *_in(
        "examples/barlow_recipes/steps.py",
        STEPS,
        ("accumulated-gradients-not-averaged", "settings.scale_loss / settings.accumulate", "settings.scale_loss"),
        (
            "all-ranks-draw-alike",
            "seed_of(settings.seed, state.step, distributed.rank())",
            "seed_of(settings.seed, state.step)",
        ),
        (
            "running-statistics-of-a-step-left-out-stay",
            "torch._foreach_copy_(list(state.model.buffers()), run.buffers_before)",
            "state.optimizer.zero_grad()",
        ),
    ),
    *_in(
        "examples/barlow_recipes/steps.py",
        ("tests/examples/test_example_distributed.py::test_uneven_shards_take_the_steps_of_one_process",),
        (
            "example-trains-with-one-over-world-size",
            "BarlowTwinsLoss(settings.lambd, backend",
            'BarlowTwinsLoss(settings.lambd, grad_reduction="sum", backend',
        ),
    ),
    *_in(
        "examples/barlow_recipes/models.py",
        ("tests/examples/test_example_models.py",),
        (
            "statistics-move-in-both-passes",
            "nullcontext(), statistics_kept()",
            "nullcontext(), nullcontext()",
        ),
        ("chunks-that-are-kept", "represent = computed_twice(self.backbone)", "represent = self.backbone"),
    ),
    *_in(
        "examples/barlow_recipes/official.py",
        ("tests/distributed/test_official_program.py",),
        (
            "official-momenta-of-vectors-as-they-are",
            "LEARNING_RATE_BIASES / learning_rate_biases if learning_rate_biases else 1.0)",
            "1.0)",
        ),
    ),
    *_in(
        "examples/barlow_recipes/probes.py",
        ("tests/examples/test_example_probes.py",),
        ("neighbours-vote-with-their-cosines", "(similarity / TEMPERATURE).exp()", "similarity"),
    ),
    *_in(
        "examples/barlow_recipes/ablation.py",
        ABLATIONS,
        ("learning-rate-searched-on-the-test-images", "return DataSet(data.name, train, test, bank)", "return data"),
    ),
    *_in(
        "examples/barlow_recipes/ablation_report.py",
        ABLATIONS,
        ("gains-taken-for-losses", "signs = (1, -1, -1, 1)", "signs = (1, -1, 1, -1)"),
    ),
    *_in(
        "examples/barlow_recipes/methods.py",
        ABLATIONS,
        ("cross-entropy-of-all-pairs", "C.new_full((len(C),), -math.inf)", "C.new_zeros(len(C))"),
        ("moving-mean-that-does-not-move", "momentum = 1 - (1 - MOMENTUM)", "momentum = 1 - 0 * (1 - MOMENTUM)"),
    ),
    *_in(
        "examples/barlow_recipes/weights.py",
        ("tests/examples/test_example_weights.py",),
        ("longer-sequence-taken-for-a-shorter-one", " or name[0].isdigit()}", "}"),
        ("slower-encoder-preferred", "any(word in prefix for word in SECOND)", "False"),
    ),
]

RELATED = ("tests/test_relatives.py::TestPublishedNumbers", "tests/test_relatives.py::TestGradients")
RELATED_GLOBAL = ("tests/distributed/test_relatives_global.py::test_equals_the_concatenated_batch",)
RELATED_ERRORS = ("tests/test_relatives.py::TestErrors",)
RELATED_WEIGHTED = ("tests/distributed/test_relatives_global.py::test_ranks_that_weight_the_loss_differently",)

RELATIVES = [
    *_in(
        "barlow_loss/_gram_norm.py",
        RELATED,
        (
            "gram-of-the-others-for-x-alone",
            "grams = (m, *[k] * len(ys))\n    return [",
            "grams = (k, *[k] * len(ys))\n    return [",
        ),
        ("gram-of-the-first-other-alone", "        m += _gram(batch, y, rows)", "        _gram(batch, y, rows)"),
        ("own-diagonal-kept-in-the-primal", "        c.diagonal().zero_()\n", ""),
        (
            "own-diagonal-kept-in-the-dual",
            "return product, -slope * diagonal",
            "return product, torch.zeros_like(diagonal)",
        ),
        ("norm-differentiated-twice-in-silence", "if not torch.is_grad_enabled() or torch", "if True or torch"),
    ),
    *_in(
        "barlow_loss/_gram_norm.py",
        RELATED_GLOBAL,
        ("own-rows-for-all-rows", "torch.mm(k, every) if needs_grad", "torch.mm(k[:, : len(x)], x) if needs_grad"),
    ),
    *_in(
        "barlow_loss/_gram_norm.py",
        RELATED_WEIGHTED,
        ("incoming-gradients-of-this-rank-alone", "sums = all_reduce_sum(batch.shards.group, *own)", "sums = own"),
        ("sum-reduced-as-mean", 'if batch.grad_reduction == "sum" else sums', "if False else sums"),
    ),
    *_in(
        "barlow_loss/_vicreg.py",
        RELATED,
        ("biased-variance", "wide[2] / (batch.shards.total - 1)", "wide[2] / batch.shards.total"),
        ("covariances-over-n", "scale = 1 / (batch.shards.total - 1)", "scale = 1 / batch.shards.total"),
        ("variance-of-one-view", "clamp_min(0).mean()", "clamp_min(0)[0].mean()"),
        ("covariance-once", ".mean() * (2 / d)", ".mean() / d"),
        ("closed-hinges-pull", " * (sigma < 1) / sigma", " / sigma"),
        ("views-deviate-alike", "(difference, -0.5)", "(difference, 0.5)"),
        ("pairs-of-views-counted-twice", "of_deviation = a * (4 / ((count - 1)", "of_deviation = a * (4 / (count"),
    ),
    *_in(
        "barlow_loss/_vicreg.py",
        ("tests/test_relatives_laws.py::test_large_means_in_float32",),
        (
            "pivot-far-from-the-mean",
            "pivot_of(z.index_select(0, sampled), dtype)",
            "torch.zeros_like(z[0], dtype=dtype)",
        ),
    ),
    *_in(
        "barlow_loss/_vicreg.py",
        RELATED_GLOBAL,
        ("invariance-of-this-rank-alone", "return all_reduce_sum(batch.shards.group, own)[0]", "return own"),
        ("mean-of-this-rank-alone", "            rows.add_(shift)", "            rows.add_(0 * shift)"),
    ),
    *_in(
        "barlow_loss/mixed.py",
        RELATED,
        ("mixed-in-the-order-given", ".index_select(0, permutation)", ".index_select(0, permutation.argsort())"),
        ("mixture-over-n", "/ shards.total**2", "/ shards.total"),
        (
            "mixture-without-lambda",
            "_like(mix_scale, mixture) * _like(lambd, mixture) * mixture",
            "_like(mix_scale, mixture) * mixture",
        ),
    ),
    *_in(
        "barlow_loss/_validation_relatives.py",
        RELATED_ERRORS,
        ("alpha-beyond-one", "if not 0 <= alpha <= 1:", "if not 0 <= alpha:"),
        ("permutation-too-short", "if permutation.shape != z.shape[:1]:", "if permutation.ndim != 1:"),
    ),
]

MUTANTS = [
    *LOSS,
    *DEFINITIONS,
    *VIEWS,
    *AUTOGRAD,
    *NORMALISATION,
    *PROCESSES,
    *FACE,
    *KERNELS,
    *EXAMPLE_CHECKPOINT,
    *EXAMPLE_IMAGES,
    *EXAMPLE_STEPS,
    *RELATIVES,
]
