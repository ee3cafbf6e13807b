"""Questions in SQL that every run can be asked: what the console offers.

Answers are empty where a run lacks the level.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        title: in a few words.
        sql: one statement over the tables of a run, or over their union.
    """

    title: str
    sql: str


EXAMPLES: tuple[Example, ...] = (
    Example("Load of each expert", """
select layer, expert, sum(tokens) as tokens
from expert_load
where kind = 'routed'
group by layer, expert
order by layer, expert
"""),
    Example("Busiest expert of each layer", """
select layer, expert, sum(tokens) as tokens,
       sum(tokens) / sum(sum(tokens)) over (partition by layer) as share
from expert_load
where kind = 'routed'
group by layer, expert
qualify row_number() over (partition by layer order by sum(tokens) desc) = 1
order by layer
"""),
    Example("Experts that a domain prefers", """
with share as (
    select domain, layer, expert,
           sum(tokens) / sum(sum(tokens)) over (partition by domain, layer) as share
    from expert_load
    where kind = 'routed'
    group by domain, layer, expert
)
select domain, layer, expert, share, share / avg(share) over (partition by layer, expert) as times_the_mean
from share
where share > 0
order by times_the_mean desc
limit 50
"""),
    Example("Entropy of the router", """
select layer, domain, sum(entropy_sum) / nullif(sum(logit_tokens), 0) as entropy_nats
from router_load
group by layer, domain
order by layer, domain
"""),
    Example("Easily flipped choices", """
select layer, lower, sum(tokens) as tokens
from router_histogram
where quantity = 'boundary_margin'
group by layer, lower
order by layer, lower
"""),
    Example("Gate weight by rank", """
select layer, rank, avg(weight) as gate_weight, count(*) as selections
from route
where sequence < 100 -- more take longer
group by layer, rank
order by layer, rank
"""),
    Example("First choices that repeat", """
select layer, avg((expert = before)::double) as repeats, count(*) as pairs
from (
    select layer, expert, lag(expert) over (partition by layer, step, sequence order by position) as before
    from route
    where rank = 0 and sequence < 100 -- more take longer
)
where before is not null
group by layer
order by layer
"""),
    Example("Experts chosen together", """
select layer, expert, place - 1 as other, sum(tokens) as tokens
from (
    select layer, expert, unnest(selections) as tokens, generate_subscripts(selections, 1) as place
    from expert_pair
)
where expert < place - 1
group by layer, expert, other
order by tokens desc
limit 50
"""),
    Example("Tokens of one expert", """
with token as (
    select * exclude (start, token_ids, special, modality, predicted),
           start + generate_subscripts(token_ids, 1) - 1 as position, unnest(token_ids) as token_id
    from sequence_token
    where sequence < 100 -- more take longer
)
select coalesce(try(decode(bytes)), bytes::varchar) as text, count(*) as times, avg(weight) as gate_weight
from route natural join token natural join vocabulary
where layer = (select max(layer) from layer) and expert = 0
group by text
order by times desc
limit 50
"""),
    Example("Sequences by number of experts", """
select sequence, any_value(domain) as domain, any_value(tokens) as tokens, count(distinct (layer, expert)) as experts
from route natural join sequence
where sequence < 100 -- more take longer
group by sequence
order by experts desc
"""),
    Example("Largest outputs", """
select layer, expert, kind, max(output_max) as output_max, max(gated_output_max) as gated_output_max,
       arg_max(output_max_sequence, output_max) as sequence, arg_max(output_max_position, output_max) as position
from expert_output
group by layer, expert, kind
order by output_max desc
limit 50
"""),
    Example("Residual stream", """
select layer, sum(norm_sum) / sum(tokens) as mean_norm, max(absolute_max) as largest,
       1 - sum(input_cosine_sum) / sum(tokens) as block_influence
from residual
group by layer
order by layer
"""),
    Example("Metrics of each layer", """
select layer, metric, "at", value, low, high
from metric_value
where control = 'observed' and domain is null and layer is not null and expert is null
order by metric, "at", layer
"""),
    Example("Checks that did not pass", """
select name, layer, status, value, tolerance, detail
from "check"
where status <> 'pass'
order by status, name, layer
"""),
)  # fmt: skip
"""In the order in which they are offered."""
