-- The run file: one DuckDB file per run, never written again once it is there.
--
-- A run's name is its file's stem and stands in no table. While a run is collected, every table below is a set of
-- Parquet shards; compaction merges them into this file. How shards (and hosts) add up is declared per column:
--
--   [key]     rows with equal keys are merged into one
--   [sum]     values add up (lists: element by element)
--   [max]     the largest value is kept
--   [at c]    the value that stood beside the largest value of column c
--   [row]     the table is a plain union of rows
--
-- Common columns. layer: index among the model's decoder layers, dense ones included. step: 0 unless the layer calls
-- its experts several times. kind: routed | shared. domain: label of the text. phase: prompt | decode.
-- position: index among the real (not padding) tokens of a sequence, from 0. Means are never stored: divide sums.

-- table run: where the run comes from. One row.
create table run (
    schema_version        integer,   -- [row] version of this file
    tool_version          varchar,   -- [row] version of moescope that wrote it
    created_at            timestamp, -- [row] start of the collection, UTC
    model                 varchar,   -- [row] folder name or hub id
    model_revision        varchar,   -- [row] hub revision, empty for a folder
    model_fingerprint     varchar,   -- [row] SHA-256 over names, shapes, types and samples of the weights
    model_class           varchar,   -- [row] class of the model
    model_type            varchar,   -- [row] model_type of its configuration
    model_config          varchar,   -- [row] its configuration, JSON
    num_layers            integer,   -- [row] decoder layers, dense ones included
    hidden_size           integer,   -- [row] width of the residual stream
    dtype                 varchar,   -- [row] type of the weights while watching
    device                varchar,   -- [row] where it ran
    backend               varchar,   -- [row] experts implementation the model used, as transformers names it
    torch_version         varchar,   -- [row]
    transformers_version  varchar,   -- [row]
    origin                varchar,   -- [row] collect | watch | import FORMAT
    levels                varchar,   -- [row] what was recorded, a comma list
    settings              varchar,   -- [row] options of the collection, JSON (batch, sequence length, seed, BOS, packing, ...)
    text_kept             boolean,   -- [row] whether token ids and text are in this file
    sequences             bigint,    -- [row]
    tokens                bigint,    -- [row] real tokens watched; padding is never counted
    seconds               double,    -- [row] wall time of the forwards
    complete              boolean    -- [row] false when the collection was interrupted and finished early
);

-- table layer: the MoE layers, in the order of a trace's axis 0.
create table layer (
    layer            integer, -- [key]
    step             integer, -- [key]
    module           varchar, -- [at num_experts] path of the experts module
    experts_class    varchar, -- [at num_experts]
    router_class     varchar, -- [at num_experts] empty where the router has no module of its own
    num_experts      integer, -- [max] routed experts E
    top_k            integer, -- [max] k; the largest, where it varies by token
    num_shared       integer, -- [max] shared experts beside the routed ones
    expert_width     integer  -- [max] neurons per routed expert
);

-- table sequence: one row per sequence.
create table sequence (
    sequence      uinteger, -- [key]
    domain        varchar,  -- [at tokens]
    source        varchar,  -- [at tokens] file or document it was cut from
    tokens        uinteger, -- [max] real tokens
    prompt_tokens uinteger  -- [max] of which prompt; the others were generated
);

-- table sequence_token: token ids of a sequence, in chunks. Empty when the run keeps no text.
create table sequence_token (
    sequence  uinteger,   -- [row]
    start     uinteger,   -- [row] position of the first token of the chunk
    token_ids uinteger[], -- [row]
    special   boolean[]   -- [row] special token of the tokenizer (BOS, EOS, ...)
);

-- table vocabulary: the token ids that occur. Empty when the run keeps no text.
create table vocabulary (
    token_id uinteger, -- [key]
    bytes    blob      -- [max] UTF-8 bytes the token stands for; may be a part of a character
);

-- table route_chunk: the trace, packed. View route unpacks it for SQL.
create table route_chunk (
    layer      integer,     -- [row]
    step       integer,     -- [row]
    sequence   uinteger,    -- [row]
    start      uinteger,    -- [row] position of the first token of the chunk (at most 512 tokens)
    width      utinyint,    -- [row] k: entries per token in both lists
    scale      float,       -- [row] gate weight = weights / 255 * scale
    experts    usmallint[], -- [row] selections in descending gate weight; the type's largest value = none (utinyint up to 255 experts)
    weights    utinyint[]   -- [row] gate weights in 8 bits
);

-- table expert_load: how often and how strongly each expert was used. Level routing.
create table expert_load (
    layer               integer, -- [key]
    step                integer, -- [key]
    expert              integer, -- [key]
    kind                varchar, -- [key]
    domain              varchar, -- [key]
    phase               varchar, -- [key]
    tokens              bigint,  -- [sum] selections: tokens that used the expert
    first_choices       bigint,  -- [sum] of which with the largest gate weight
    first_positions     bigint,  -- [sum] of which at position 0
    gate_sum            double,  -- [sum] gate weights
    gate_square_sum     double,  -- [sum] squares of gate weights
    gate_share_sum      double,  -- [sum] gate weights divided by their sum over the token's selection
    probability_sum     double,  -- [sum] router probability over all tokens: softmax, or sigmoid over its sum; null where neither fits
    logit_sum           double,  -- [sum] router logits over all tokens
    logit_square_sum    double   -- [sum] squares of router logits over all tokens
);

-- table router_load: how decided the router was. Level routing.
create table router_load (
    layer                     integer, -- [key]
    step                      integer, -- [key]
    domain                    varchar, -- [key]
    phase                     varchar, -- [key]
    tokens                    bigint,  -- [sum] tokens routed
    selections                bigint,  -- [sum] expert selections, at most tokens x k
    logit_tokens              bigint,  -- [sum] tokens whose logits were seen and finite; divide the sums below by it
    nonfinite_tokens          bigint,  -- [sum] tokens with NaN or infinite logits
    entropy_sum               double,  -- [sum] entropy of the router probability, nats
    top_probability_sum       double,  -- [sum] largest router probability
    selected_probability_sum  double,  -- [sum] router probability on the selection
    weight_entropy_sum        double,  -- [sum] entropy of the gate weights over the selection, nats
    first_margin_sum          double,  -- [sum] largest minus second largest logit
    boundary_margin_sum       double,  -- [sum] k-th minus (k+1)-th logit, without selection bias: small means easily flipped
    boundary_ties             bigint,  -- [sum] tokens whose boundary margin is exactly 0
    log_partition_square_sum  double   -- [sum] (logsumexp of the logits) squared: z-loss
);

-- table router_histogram: the same quantities as distributions. Level routing.
create table router_histogram (
    layer    integer, -- [key]
    step     integer, -- [key]
    domain   varchar, -- [key]
    phase    varchar, -- [key]
    quantity varchar, -- [key] entropy | top_probability | selected_probability | first_margin | boundary_margin
    lower    double,  -- [key] lower edge of the bin
    upper    double,  -- [key] upper edge of the bin; the last bin also holds what lies above
    tokens   bigint   -- [sum]
);

-- table expert_output: what each expert's down_proj puts out, before the gate weight. Level activations.
create table expert_output (
    layer                    integer,  -- [key]
    step                     integer,  -- [key]
    expert                   integer,  -- [key]
    kind                     varchar,  -- [key]
    domain                   varchar,  -- [key]
    phase                    varchar,  -- [key]
    tokens                   bigint,   -- [sum] tokens that went through the expert
    norm_sum                 double,   -- [sum] L2 norm of the output (EAN)
    norm_square_sum          double,   -- [sum] its square
    gated_norm_sum           double,   -- [sum] gate weight x norm (REAP's numerator)
    gated_norm_square_sum    double,   -- [sum] its square
    output_max               double,   -- [max] largest |output| over tokens and channels
    output_max_channel       integer,  -- [at output_max] its channel
    output_max_sequence      uinteger, -- [at output_max] its sequence
    output_max_position      uinteger, -- [at output_max] its position
    gated_output_max         double,   -- [max] largest gate weight x |output|
    first_routed_output_max  double,   -- [max] largest |output| over the first token of each sequence that used the expert
    input_max                double    -- [max] largest |activation| that enters down_proj
);

-- table neuron_activation: per neuron of each expert, pooled over domains. Level activations.
create table neuron_activation (
    layer        integer,  -- [key]
    step         integer,  -- [key]
    expert       integer,  -- [key]
    kind         varchar,  -- [key]
    phase        varchar,  -- [key]
    tokens       bigint,   -- [sum]
    square_sum   double[]  -- [sum] squares of the activation that enters down_proj, one value per neuron
);

-- table residual: the residual stream after each decoder layer. Level activations.
create table residual (
    layer             integer,  -- [key]
    domain            varchar,  -- [key]
    phase             varchar,  -- [key]
    tokens            bigint,   -- [sum]
    norm_sum          double,   -- [sum] L2 norm of the hidden state
    absolute_max      double,   -- [max] largest |hidden state|
    channel           integer,  -- [at absolute_max]
    sequence          uinteger, -- [at absolute_max]
    position          uinteger, -- [at absolute_max]
    median_there      double,   -- [at absolute_max] median |hidden state| of that token
    later_max         double    -- [max] largest |hidden state| over positions after the first
);

-- table check: the capture's proofs of itself.
create table "check" (
    name      varchar, -- [row] what was checked
    layer     integer, -- [row] null for the whole model
    step      integer, -- [row]
    status    varchar, -- [row] pass | warning | fail | skipped
    value     double,  -- [row] what was measured
    tolerance double,  -- [row] what was allowed
    detail    varchar  -- [row] one sentence
);

-- view route: the trace as (sequence, position, layer, rank, expert, weight), rank 0 = largest gate weight.
create view route as
select layer, step, sequence, start + (i // width)::uinteger as position, (i % width)::utinyint as rank,
       experts[i + 1] as expert, weights[i + 1] / 255.0 * scale as weight
from (select *, unnest(range(len(experts))) as i from route_chunk)
where experts[i + 1] <> no_expert();
