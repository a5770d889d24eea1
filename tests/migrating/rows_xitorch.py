"""From xitorch 0.5.1."""

from tests.migrating.rows import Row, Table

_ROOT = "rootfinder(g, z0, params=(W, x), {})"
ROOT = Table(
    name="xitorch-rootfinder",
    peer="`xitorch.optimize.rootfinder`",
    theirs=_ROOT,
    ours="ti.root(g, z0, W, x, {}).value",
    defaults="f_tol=1e-10, bck_options=dict(method='exactsolve')",
    rows=(
        Row(
            "method='broyden1'",
            "solver=ti.Broyden(update='good')",
            "leave it out for Newton's method and its safety net",
        ),
        Row("method='broyden2'", "solver=ti.Broyden(update='bad')"),
        Row(
            "method='linearmixing', maxiter=500",
            "solver=ti.Picard(damping=0.9)",
            "one step length; none is searched for",
        ),
        Row("maxiter=100", "max_steps=100"),
        Row("f_tol=1e-8", "solver=ti.Auto(atol=1e-8, rtol=0.0, norm='two')", "one norm for all there"),
        Row("f_rtol=1e-8", "solver=ti.Auto(atol=0.0, rtol=1e-8)", "relative to the residual at the start, both"),
        Row(
            "x_tol=1e-8, x_rtol=1e-8",
            "",
            "a small step is no evidence; the default tolerance of a root looks at z, too",
        ),
        Row("alpha=-0.5", "", "Broyden's method finds its scale by itself"),
        Row("max_rank=10", "solver=ti.Broyden(history=10)"),
        Row("line_search=False", "solver=ti.Newton(max_backtracks=0)"),
        Row("verbose=False", "verbose=False"),
        Row("bck_options=dict(method='exactsolve')", "adjoint=ti.Implicit(ti.LU())"),
        Row("bck_options=dict(method='bicgstab')", "adjoint=ti.Implicit(ti.BiCGStab())"),
        Row(
            "bck_options=dict(method='gmres', rtol=1e-10)",
            "adjoint=ti.Implicit(ti.GMRES(), rtol=1e-10)",
            "on three unknowns xitorch's leaves an error of 7e-4 in the gradient, whatever the tolerance",
            check="inexact_gmres",
        ),
        Row("bck_options=dict(method='broyden1')", "adjoint=ti.Implicit(ti.GMRES())", tolerance=1e-5),
        Row("bck_options=dict(method='bicgstab', rtol=1e-10)", "adjoint=ti.Implicit(rtol=1e-10)"),
        Row("bck_options=dict(method='bicgstab', max_niter=50)", "adjoint=ti.Implicit(ti.BiCGStab(max_steps=50))"),
        Row(
            "maxitre=3",
            "max_setps=3",
            "an unknown option is ignored there, and an error here",
            check="unknown_option_xitorch",
        ),
    ),
)

OTHERS = Table(
    name="xitorch-others",
    peer="xitorch",
    theirs="{}",
    ours="{}",
    rows=(
        Row(
            "equilibrium(h, z0, params=(W, x), f_tol=1e-10)",
            "ti.fixed_point(h, z0, W, x).value",
        ),
        Row(
            "equilibrium(h, z0, params=(W, x), method='anderson_acc', msize=5, f_tol=1e-10, maxiter=200)",
            "ti.fixed_point(h, z0, W, x, solver=ti.Anderson(history=5)).value",
            "`beta` is `mixing`; there is no `lmbda`, and `feat_ndims` is `batch_dims` from the other end",
        ),
        Row(
            "minimize(energy, z0, params=(W, x), f_tol=1e-10)",
            "ti.minimize(energy, z0, W, x).value",
        ),
        Row(
            "minimize(energy, z0, params=(W, x), method='gd', step=0.1, maxiter=2000, f_rtol=0.0, x_rtol=1e-12)",
            "ti.minimize(energy, z0, W, x, solver=ti.LBFGS()).value",
            "there is no plain gradient descent",
            tolerance=1e-5,
        ),
        Row(
            "minimize(energy, z0, params=(W, x), method='adam', step=0.02, maxiter=4000, f_rtol=0.0, x_rtol=1e-14)",
            "ti.minimize(energy, z0, W, x, solver=ti.NewtonCG()).value",
            "nor Adam",
            tolerance=1e-4,
        ),
        Row(
            "rootfinder(lambda z: g(z, W, x), z0, f_tol=1e-10)",
            "ti.root(lambda z: g(z, W, x), z0).value",
            "xitorch loses the gradients of what a function closes over; here they are found",
            check="closures",
        ),
        Row(
            "rootfinder(Editable(W).g, z0, params=(x,), f_tol=1e-10)",
            "ti.root(Editable(W).g, z0, x).value",
            "no `EditableModule`, no `getparamnames`: any object or nn.Module",
        ),
        Row(
            "solve(LinearOperator.m(A), b[:, None], method='exactsolve')[:, 0]",
            "ti.root(lambda y: A @ y - b, torch.zeros_like(b), solver=ti.Newton()).value",
            "a linear equation is a root as well; one step",
        ),
        Row(
            "solve(LinearOperator.m(spd, is_hermitian=True), b[:, None], method='cg')[:, 0]",
            "ti.root(lambda y: spd @ y - b, torch.zeros_like(b), "
            "solver=ti.Newton(ti.CG()), adjoint=ti.Implicit(ti.CG())).value",
            "a `LinearOperator` without a matrix is the function of its product",
        ),
    ),
)

TABLES = (ROOT, OTHERS)
