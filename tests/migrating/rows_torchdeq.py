"""From TorchDEQ 0.1.0."""

from tests.migrating.rows import Row, Table

CALLS = Table(
    name="torchdeq-calls",
    peer="TorchDEQ",
    theirs="{}",
    ours="{}",
    rows=(
        Row(
            "get_deq(ift=True, f_tol=1e-9, f_max_iter=200)(f, z0)[0][-1]",
            "ti.fixed_point(f, z0, batch_dims=1).value",
            "the state itself, not a list of states",
        ),
        Row(
            "get_deq(ift=True, f_tol=1e-9, f_max_iter=200)(lambda z: cell(z, x), z0)[0][-1]",
            "ti.nn.FixedPoint(cell)(x)",
            "the layer holds its cell; it starts from zeros like x",
        ),
        Row(
            "get_deq(ift=True, f_tol=1e-9, f_max_iter=200)(pair, (z0, z0))[0][-1]",
            "ti.fixed_point(lambda z: pair(*z), (z0, z0), batch_dims=1).value",
            "any pytree of tensors; fn is given one argument",
        ),
        Row(
            "get_deq(f_tol=1e-9, f_max_iter=200).eval()(f, z0)[0][-1]",
            "ti.fixed_point(f, z0, batch_dims=1).value",
            "in evaluation mode TorchDEQ's value has no gradient; ours does not depend on the mode",
            check="no_gradient_in_eval",
        ),
        Row(
            "get_deq(f_max_iter=13, f_tol=0.0)(f, z0)[1]['abs_lowest']",
            "ti.fixed_point(f, z0, batch_dims=1, solver=ti.Picard(norm='two'), max_steps=12, "
            "on_failure='ignore').residual",
            "`info` is the rest of the `Solution`: `status`, `converged`, `residual`, `steps`, `trace`; theirs is the "
            "residual of the state one step before the one that is returned",
            check="value",
        ),
        Row(
            "get_deq(f_tol=1e-3)(f, z0, backward_writer=seen.append)[0][-1]",
            "ti.fixed_point(f, z0, batch_dims=1).adjoint",
            "the backward pass fills it: `status`, `residual`, `steps`, `evaluations`",
            check="backward_report",
        ),
        Row(
            "get_deq(f_max_iter=200, f_tol=1e-9)(f, z0, solver_kwargs=dict(f_max_iter=3))[0][-1]",
            "ti.fixed_point(f, z0, batch_dims=1, solver=ti.Picard(), max_steps=3, "
            "adjoint=ti.Unroll(steps=1), on_failure='ignore').value",
            "an option of the call",
        ),
        Row("reset_deq(cell)", "", "masks and norms are those of one solve without being told", check="no_reset"),
        Row("mem_gc(cell, (z0, x))", "torch.utils.checkpoint.checkpoint(cell, z0, x, use_reentrant=False)"),
        Row(
            "jac_reg(f(zs), zs)",
            "torch.autograd.grad(f(zs), zs, torch.randn_like(zs), create_graph=True)[0].square().mean()",
        ),
        Row(
            "fp_correction(loss, (states, y), gamma=0.8)",
            "sum(0.8 ** (len(states) - 1 - i) * loss(s, y) for i, s in enumerate(states))",
        ),
        Row(
            "get_deq(f_tol=1e-9).eval()(f, z0, sradius_mode=True)[1]['sradius']",
            "torch.linalg.eigvals(jacobian(z0 + zs)).abs().amax(1)",
            "TorchDEQ takes a Rayleigh quotient, wrong for complex eigenvalues: 0.41 for a rotation of radius 0.9; "
            "`jacobian = torch.func.vmap(torch.func.jacrev(f))`, with f of one sample",
            check="spectral_radius",
        ),
        Row(
            "apply_norm(normed, 'weight_norm')",
            "torch.nn.utils.parametrizations.weight_norm(normed.linear)",
            "applied to each layer; the same weight to begin with, and computed once per evaluation",
            check="same_weight",
        ),
        Row(
            "apply_norm(normed, 'spectral_norm')",
            "torch.nn.utils.parametrizations.spectral_norm(normed.linear)",
            "the weight is divided by its largest singular value; in TorchDEQ a learnable scale makes up for that",
            check="spectral_norm_is_one",
        ),
    ),
)

_NOT_IFT = "adjoint=ti.JacobianFree()"
OPTIONS = Table(
    name="torchdeq-options",
    peer="`get_deq`",
    theirs="get_deq({})(f, z0)[0][-1]",
    ours="ti.fixed_point(f, z0, batch_dims=1, {}).value",
    defaults="ift=True, f_tol=1e-9, f_max_iter=200, b_tol=1e-10, b_max_iter=200",
    rows=(
        Row("core='sliced'", ""),
        Row("core='indexing'", ""),
        Row("ift=True", "adjoint=ti.Implicit()", "our default; theirs is `grad=1`"),
        Row("hook_ift=True", "adjoint=ti.Implicit()", "memory is that of one evaluation anyway"),
        Row("ift=False, grad=1", "adjoint=ti.JacobianFree()"),
        Row("ift=False, grad=5, tau=0.7", "adjoint=ti.PhantomGradient(steps=5, damping=0.7)"),
        Row("ift=False, grad=5", "adjoint=ti.Unroll(steps=5)", "the same, with derivatives of every order"),
        Row("f_solver='fixed_point_iter'", "solver=ti.Picard()"),
        Row("f_solver='simple_fixed_point_iter', f_max_iter=60", "solver=ti.Picard(check_every=8)", "stops when done"),
        Row("f_solver='anderson'", "solver=ti.Anderson()", tolerance=1e-5),
        Row("f_solver='broyden'", "solver=ti.Broyden()"),
        Row("b_solver='fixed_point_iter'", "adjoint=ti.Implicit(ti.Neumann())"),
        Row("b_solver='anderson'", "adjoint=ti.Implicit(ti.GMRES())", tolerance=1e-5),
        Row("b_solver='broyden'", "adjoint=ti.Implicit(ti.GMRES())"),
        Row(
            "b_solver='simple_fixed_point_iter'",
            "adjoint=ti.Implicit(ti.Neumann())",
            "TorchDEQ's raises a TypeError in the backward pass",
            check="simple_backward_fails",
        ),
        Row("f_max_iter=40", "max_steps=40"),
        Row("b_max_iter=40", "adjoint=ti.Implicit(ti.Neumann(max_steps=40))"),
        Row("f_tol=1e-6, f_stop_mode='abs'", "solver=ti.Picard(atol=1e-6, rtol=0.0, norm='two')", tolerance=2e-5),
        Row("f_tol=1e-6, f_stop_mode='rel'", "solver=ti.Picard(atol=0.0, rtol=1e-6)", tolerance=2e-5),
        Row(
            "b_tol=1e-6, b_stop_mode='rel'",
            "adjoint=ti.Implicit(rtol=1e-6)",
            "relative to the incoming gradient, so that the scale of the loss does not matter",
            tolerance=2e-5,
        ),
        Row(
            "b_tol=1e-6, b_stop_mode='abs'",
            "adjoint=ti.Implicit(rtol=1e-6)",
            "absolute in TorchDEQ: a loss a million times smaller loses the gradient's digits",
            check="absolute_backward_tolerance",
        ),
        Row(
            "eval_factor=2.0", "max_steps=80 if not model.training else 40", "an ordinary argument", check="evaluation"
        ),
        Row("eval_f_max_iter=80", "max_steps=80 if not model.training else 40", check="evaluation"),
        Row("no_stat=True", "", "`trace=True` asks for a history"),
        Row("norm_type='weight_norm'", "", "read by `apply_norm` alone: see above, and `norm_clip`, … as well"),
        Row(
            "jac_loss_weight=0.1",
            "",
            "read by your training loop alone, as `jac_loss_freq`, `jac_incremental`, `gamma`",
        ),
        Row(
            "nonsense=1, stop_mode='rel'",
            "nonsense=1",
            "an unknown option is ignored there, and an error here",
            check="unknown_option",
        ),
    ),
)

STATES = Table(
    name="torchdeq-states",
    peer="several states, of which the loss is a sum",
    theirs="{}",
    ours="{}",
    rows=(
        Row(
            "get_deq(f_tol=1e-9, f_max_iter=200, grad=4, sup_gap=2)(f, z0)[0]",
            "[ti.fixed_point(f, z0, batch_dims=1, adjoint=ti.Unroll(steps=k)).value for k in (2, 4)]",
        ),
        Row(
            "get_deq(f_tol=1e-9, f_max_iter=200, grad=4, sup_loc=[1, 3])(f, z0)[0]",
            "[ti.fixed_point(f, z0, batch_dims=1, adjoint=ti.Unroll(steps=k)).value for k in (1, 3, 4)]",
        ),
        Row(
            "get_deq(core='indexing', f_tol=0.0, f_max_iter=20, n_states=2)(f, z0)[0]",
            "[ti.fixed_point(f, z0, batch_dims=1, solver=ti.Picard(), max_steps=k, adjoint=ti.Unroll(steps=1), "
            "on_failure='ignore').value for k in (10, 20)]",
        ),
        Row(
            "get_deq(core='indexing', f_tol=0.0, f_max_iter=20, indexing=[5, 10])(f, z0)[0]",
            "[ti.fixed_point(f, z0, batch_dims=1, solver=ti.Picard(), max_steps=k, adjoint=ti.Unroll(steps=1), "
            "on_failure='ignore').value for k in (5, 10, 20)]",
        ),
    ),
)

SOLVERS = Table(
    name="torchdeq-solvers",
    peer="`solver_kwargs` of the call",
    theirs="deq(f, z0, solver_kwargs=dict({}))[0][-1]",
    ours="ti.fixed_point(f, z0, batch_dims=1, {}).value",
    defaults="",
    rows=(
        Row("tau=0.8", "solver=ti.Picard(damping=0.8)", "the stopping rule looks at the undamped residual"),
        Row("m=6, lam=1e-4", "solver=ti.Anderson(history=5)", "6 states are 5 differences; nothing to regularise"),
        Row("LBFGS_thres=20", "solver=ti.Broyden(history=20)"),
        Row("ls=True", "solver=ti.Newton()", "Newton's method searches along its step; Broyden's has a safeguard"),
        Row("return_final=False", "", "the best iterate is what is returned"),
    ),
)

TABLES = (CALLS, OPTIONS, STATES, SOLVERS)
