"""A second judge of plans, for tests: it runs small plans in every interleaving, on symbols.

It knows the execution model as a machine (`machine`), every instruction as an operation on symbols
(`operations`), which operands each may have (`signatures`), and what must hold of the whole
(`explore`). It was written from the instruction set's description and shares no code with the
checker, the partial order or the simulator; it takes only the types of `planner.plan.types`. It
does not know time, nor how the checker reasons. `judge` is its one entry.
"""

from oracle.explore import judge
from oracle.facts import Fault, OracleResult

__all__ = ["Fault", "OracleResult", "judge"]
