"""From TorchOpt 0.7.3."""

from tests.migrating.rows import Row, Table

CALLS = Table(
    name="torchopt",
    peer="TorchOpt",
    theirs="{}",
    ours="{}",
    rows=(
        Row(
            "custom_root(optimality, argnums=(1, 2), solve=solve_normal_cg())(solver)(z0, W, x)",
            "ti.root(optimality, z0, W, x).value",
            "no solver to write; every argument has its gradient, and what fn closes over",
        ),
        Row(
            "custom_root(lambda z, W, x: h(z, W, x) - z, argnums=(1, 2), solve=solve_normal_cg())(solver)(z0, W, x)",
            "ti.fixed_point(h, z0, W, x).value",
            "TorchOpt has no `custom_fixed_point`",
        ),
        Row(
            "custom_root(torch.func.grad(energy), argnums=(1, 2), solve=solve_cg())(minimiser)(z0, W, x)",
            "ti.minimize(energy, z0, W, x).value",
        ),
        Row(
            "custom_root(optimality, argnums=1, solve=solve_normal_cg())(solver)(z0, W, x)",
            "ti.root(optimality, z0, W, x.detach()).value",
            "what is to have no gradient is detached (`argnums=2` alone raises an IndexError in TorchOpt)",
        ),
        Row(
            "custom_root(optimality, argnums=(1, 2), has_aux=True, solve=solve_normal_cg())(with_aux)(z0, W, x)[0]",
            "ti.root(optimality, z0, W, x).value",
            "what a solver has to tell is in the `Solution`",
        ),
        Row(
            "custom_root(optimality, argnums=(1, 2), solve=solve_inv())(solver)(z0, W, x)",
            "ti.root(optimality, z0, W, x, adjoint=ti.Implicit(ti.LU())).value",
        ),
        Row(
            "custom_root(lambda z, W, x: z - h(z, W, x), argnums=(1, 2), solve=solve_inv(ns=True, maxiter=4))"
            "(solver)(z0, W, x)",
            "ti.fixed_point(h, z0, W, x, adjoint=ti.NeumannSeries(4)).value",
            "the same four terms beyond the first",
        ),
        Row(
            "custom_root(torch.func.grad(energy), argnums=(1, 2), solve=solve_cg(rtol=1e-10, maxiter=50))"
            "(minimiser)(z0, W, x)",
            "ti.minimize(energy, z0, W, x, adjoint=ti.Implicit(ti.CG(max_steps=50), rtol=1e-10)).value",
            "a `ridge` is a term of the objective; `init` is `ti.Implicit(warm_start=ti.WarmStart())`",
        ),
        Row(
            "custom_root(optimality, argnums=(1, 2), solve=solve_normal_cg(maxiter=100))(solver)(z0, W, x)",
            "ti.root(optimality, z0, W, x, adjoint=ti.Implicit(ti.GMRES(max_steps=100))).value",
            "without the square of the condition number",
        ),
        Row(
            "Inner(z0, W, x).solve().z",
            "ti.minimize(energy, z0, W, x).value",
            "an `ImplicitMetaGradientModule`: `objective` becomes fn, its parameters z, its meta-parameters arguments",
        ),
        Row(
            "second(custom_root(optimality, argnums=1, solve=solve_normal_cg())(solver)(z0, W, x))",
            "second(ti.root(optimality, z0, W, x).value)",
            "a second derivative is wrong there, without a word",
            check="second_derivative",
        ),
    ),
)

TABLES = (CALLS,)
