"""Where state lies and where work is done on a mesh of devices; the numbers are those of one device.

Along Explicit axes of a mesh the layout of an array is part of its type, along Auto axes the compiler chooses it. All
work is done along Auto axes, and its results are laid out as the parameters and the old state are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import optax

# Of a parameter's layout along Auto axes nothing is known while its step is traced; that an array shall lie as it does
# can be said by `shard_alike` alone, which JAX has nowhere else. All that is experimental here is in this file.
from jax.experimental.shard_alike import shard_alike
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psgd_jax_backend._state import Path, Tree

# Arrays of fewer numbers are kept whole on every device: what they would save is less than what they would cost.
WORTH_SPREADING = 4096


class Spread(NamedTuple):
    """A mesh, and its axes over which factors, and the work on stacks, are spread; no axes where all is on one device.

    axes: the last of the mesh first, as layers of a stack are split. Rows are split by the first of the mesh first, as
    users do, so that what splits rows most finely can move to the layers without disturbing the rest.
    """

    mesh: Any = None
    axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, arrays: list[jax.Array], over: str | tuple[str, ...] | None = None) -> Spread:
        """The mesh of arrays, or else of the context. over: names of axes, None for all of them."""
        meshes = [jax.typeof(x).sharding.mesh for x in arrays]
        mesh = next((m for m in meshes if not m.empty), jax.sharding.get_abstract_mesh())
        # Inside jax.shard_map arrays are parts, and where the others are is for the caller to say.
        if mesh.empty or AxisType.Manual in mesh.axis_types:
            return cls()
        named = mesh.axis_names if over is None else (over,) if isinstance(over, str) else tuple(over)
        for name in named:
            if name not in mesh.axis_names:
                raise ValueError(f"spread_over={over!r}: {name!r} is no axis of the mesh, which has {mesh.axis_names}")
        axes = tuple(name for name in reversed(mesh.axis_names) if name in named and mesh.shape[name] > 1)
        # Outside of jit, arrays know their devices.
        shardings = [x.sharding for x in arrays if not isinstance(x, jax.core.Tracer)]
        return cls(next((s.mesh for s in shardings if isinstance(s, NamedSharding)), mesh), axes)

    @property
    def devices(self) -> int:
        """How many parts there are."""
        return prod(self.mesh.shape[name] for name in self.axes)

    def spec(self, shape: tuple[int, ...], layers: bool = False) -> PartitionSpec:
        """How state of a shape lies: each axis of the mesh splits the first axis that it divides.

        layers: the first axis counts layers, whose work is spread too; then nothing is too small.
        """
        if not layers and prod(shape) < WORTH_SPREADING:
            return PartitionSpec()
        split: list[tuple[str, ...]] = [() for _ in shape]
        left = list(shape)
        for name in self.axes:
            size = self.mesh.shape[name]
            place = next((i for i, n in enumerate(left) if n and n % size == 0), None)
            if place is not None:
                split[place] = (*split[place], name) if layers and not place else (name, *split[place])
                left[place] //= size
        return PartitionSpec(*(names or None for names in split))

    # ---- a whole update ------------------------------------------------------------------
    def run(self, work: Callable[..., Tree], likes: Callable[[], Tree], *args: Tree) -> Tree:
        """work(*args) with Auto axes; its results lie as their counterparts in `likes()`: arrays, `PartitionSpec`s."""
        if self.mesh is None:
            return work(*args)
        like = likes()
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        explicit = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
        if explicit:
            types = jax.tree.map(self._type, like, is_leaf=_is_spec)
            work = jax.sharding.auto_axes(work, axes=tuple(explicit), out_sharding=types)
        with self._context():
            out = work(*args)
            if len(explicit) == len(kinds):
                return out
            return jax.tree_util.tree_map_with_path(self._settled, like, out, is_leaf=_is_spec)

    def _context(self) -> Any:
        """The mesh in force."""
        if not jax.sharding.get_abstract_mesh().empty:
            return nullcontext()
        return jax.set_mesh(self.mesh) if isinstance(self.mesh, Mesh) else jax.sharding.use_abstract_mesh(self.mesh)

    def _type(self, like: Tree) -> NamedSharding:
        """The layout of an array as its type says it, replicated where it says none."""
        mesh = self.mesh.abstract_mesh if isinstance(self.mesh, Mesh) else self.mesh
        if _is_spec(like):
            return NamedSharding(mesh, like)
        sharding = jax.typeof(like).sharding
        return NamedSharding(mesh, PartitionSpec()) if sharding.mesh.empty else sharding

    @staticmethod
    def _settled(path: Path, like: Tree, x: jax.Array) -> jax.Array:
        """An array laid out by a specification, or as another, wherever that may lie.

        JAX lowers equal operations of a program once, so that all arrays of one shape would be laid out alike. Their
        path in the tree, which nothing reads, keeps them apart.
        """
        if _is_spec(like):
            return jax.lax.with_sharding_constraint(x, like)
        if not x.ndim:
            return x
        if not isinstance(like, jax.core.Tracer):  # outside of jit, arrays know where they lie
            return jax.lax.with_sharding_constraint(x, like.sharding) if isinstance(like.sharding, NamedSharding) else x
        with set_xla_metadata(path=jax.tree_util.keystr(path)):
            return shard_alike(x, like)[0]

    # ---- stacks --------------------------------------------------------------------------
    # Layers move one axis of the mesh at a time; in one move the compiler would gather all of them everywhere.
    def apart(self, stacks: Tree, *, at_once: bool = False) -> Tree:
        """Stacks with each layer on one device, and copies of the last layer where there are fewer than devices.

        at_once: layers are apart already, or nearly so.
        """

        def move(x: jax.Array) -> jax.Array:
            more = -x.shape[0] % self.devices
            if more:
                x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (more, *x.shape[1:]))])
            return self._moved(x, [len(self.axes)] if at_once else range(len(self.axes) + 1))

        return jax.tree.map(move, stacks) if self.axes else stacks

    def together(self, stacks: Tree, layers: int | None = None) -> Tree:
        """The inverse of `apart`. layers: how many there were; None where they need not lie together in the end."""

        def move(x: jax.Array) -> jax.Array:
            return self._moved(x, range(len(self.axes) - 1, 0 if layers is None else -1, -1))[:layers]

        return jax.tree.map(move, stacks) if self.axes else stacks

    def _moved(self, x: jax.Array, counts: Iterable[int]) -> jax.Array:
        """The first axis split over so many axes of the mesh, in turn; the others as the compiler likes, or whole where
        there is little to split."""
        free = PartitionSpec.UNCONSTRAINED if prod(x.shape[1:]) >= WORTH_SPREADING else None
        for n in counts:
            spec = PartitionSpec(self.axes[:n] or None, *[free] * (x.ndim - 1))
            x = jax.lax.with_sharding_constraint(x, spec)
        return x

    def each(self, many: Callable[..., Tree], *stacks: Tree) -> Tree:
        """A function of stacks, layer by layer, on the devices where `apart` put them: nothing is exchanged."""
        if not self.axes:
            return many(*stacks)
        spec = PartitionSpec(self.axes)
        return jax.shard_map(many, in_specs=spec, out_specs=spec)(*stacks)

    def everywhere(self, one: Callable[..., Tree], *args: Tree) -> Tree:
        """A function of whole arrays, on every device: they are gathered once, and nothing else is exchanged."""
        if not self.axes:
            return one(*args)
        return jax.shard_map(one, in_specs=PartitionSpec(), out_specs=PartitionSpec())(*args)

    # ---- other state ---------------------------------------------------------------------
    def placed(self, tree: Tree, layers: bool) -> Tree:
        """State where `spec` says."""
        if not self.axes:
            return tree
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.spec(x.shape, layers)), tree)

    def replicated(self, tree: Tree) -> Tree:
        """Arrays with all of each on every device."""
        if not self.axes:
            return tree
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def _is_spec(x: Tree) -> TypeGuard[PartitionSpec]:
    return isinstance(x, PartitionSpec)


def state_sharding(tx: optax.GradientTransformation, params: Tree) -> Tree:
    """How the state of a transformation lies on the mesh of its parameters, before it exists.

    Momentum lies as its parameter does, and so does what other transformations in `tx` keep of a parameter. Factors are
    spread over the mesh: layers of a stack first, then rows, by each axis of the mesh that divides them. Factors below
    4096 numbers and counters are on every device.

    Args:
        tx: any transformation with PSGD methods in it.
        params: arrays, or `jax.ShapeDtypeStruct`s with a sharding, all on one mesh. Nothing is allocated.

    Returns:
        a tree of `NamedSharding`s as the state, for `jax.jit(tx.init, out_shardings=...)`, for the arguments and
        results of a training step, and to restore a checkpoint on another mesh.

    Raises:
        ValueError: for parameters without a `NamedSharding`, or on several meshes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from psgd_jax_backend import kron, state_sharding
        >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        >>> params = {"w": jax.device_put(jnp.zeros((4, 3)), NamedSharding(mesh, PartitionSpec("data")))}
        >>> state = jax.jit(kron().init, out_shardings=state_sharding(kron(), params))(params)
    """
    shardings = {jax.tree_util.keystr(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for name, sharding in shardings.items():
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"state_sharding: {name or 'the parameter'} has sharding {sharding}; put it on a mesh, "
                "jax.device_put(params, NamedSharding(mesh, PartitionSpec(...)))"
            )
    meshes = {sharding.mesh for sharding in shardings.values()}
    if len(meshes) != 1:
        raise ValueError(f"state_sharding: the parameters lie on {len(meshes)} meshes; put them on one")
    (mesh,) = meshes
    # With Explicit axes the shardings are part of the types, and types are what eval_shape is for.
    typed = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def abstract(x: Tree) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(typed, x.sharding.spec))

    with jax.sharding.use_abstract_mesh(typed.abstract_mesh):
        state = jax.eval_shape(lambda p: tx.init(p), jax.tree.map(abstract, params))
    return jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec() if x.sharding is None else x.sharding.spec), state
    )
