-- The run file: one DuckDB file per run, never written again once it is there.
--
-- A run's name is its file's stem and stands in no table. While a run is collected, every table below is a set of
-- Parquet shards; compaction merges them into this file. How shards (and hosts) add up is declared per column:
--
--   [key]     rows with equal keys are merged into one
--   [sum]     values add up (lists: element by element)
--   [max]     the largest value is kept (lists: element by element)
--   [at c]    the value that stood beside the largest value of column c
--   [row]     the table is a plain union of rows
--
-- Common columns. layer: index among the model's decoder layers, dense ones included. step: 0 unless the layer calls
-- its experts several times. kind: routed | shared. domain: label of the text; its tokens that stand for an image, video
-- or audio are kept under DOMAIN:image, DOMAIN:video and DOMAIN:audio. phase: prompt | decode.
-- position: index among the real (not padding) tokens of a sequence, from 0. Means are never stored: divide sums.
-- Tables of vectors (per neuron, channel or other expert) are pooled over domains: their domain is empty, unless the
-- collection was asked for vectors per domain. Vectors are summed in 64 bits, in shards too, and stored here in 32.

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
    expert_width     integer, -- [max] neurons per routed expert
    stack            varchar, -- [at num_experts] list of layers that it stands in: decoder | encoder | vision | ...
    granularity      varchar  -- [at num_experts] what is routed: token | sequence (all tokens of a sequence alike)
);

-- table expert: what each expert that can be selected is.
create table expert (
    layer         integer, -- [key]
    step          integer, -- [key]
    expert        integer, -- [key]
    kind          varchar, -- [max] routed | zero (puts out nothing) | copy (puts out its input) | constant
    owner_layer   integer, -- [max] layer whose weights it runs: its own, but for experts shared between layers
    owner_expert  integer  -- [max] its number there
);

-- table sequence: one row per sequence.
create table sequence (
    sequence      uinteger, -- [key]
    domain        varchar,  -- [at tokens]
    source        varchar,  -- [at tokens] file or document it was cut from
    tokens        uinteger, -- [max] real tokens
    prompt_tokens uinteger  -- [max] of which prompt; the others were generated
);

-- table sequence_label: what else a sequence is, on axes of the caller's: timestep, class, ... Empty unless it was said.
create table sequence_label (
    sequence  uinteger, -- [key]
    axis      varchar,  -- [key] name of the axis
    value     varchar   -- [max] where the sequence lies on it; numbers as text
);

-- table sequence_token: token ids of a sequence, in chunks. Empty when the run keeps no text.
create table sequence_token (
    sequence  uinteger,   -- [row]
    start     uinteger,   -- [row] position of the first token of the chunk
    token_ids uinteger[], -- [row]
    special   boolean[],  -- [row] special token of the tokenizer (BOS, EOS, ...)
    modality  varchar[],  -- [row] text | image | audio | video; null where all tokens of the chunk are text
    predicted uinteger[]  -- [row] the model's most likely next token at each position. Level predictions, else null
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

-- table expert_part: the sums that importance rests on, per sixteenth of the sequences: is the text enough? Pooled over domains.
create table expert_part (
    layer           integer,  -- [key]
    step            integer,  -- [key]
    expert          integer,  -- [key]
    kind            varchar,  -- [key]
    tokens          bigint[], -- [sum] per part: selections; store.part_of_sequence names the part of a sequence. Level routing
    gate_sum        double[], -- [sum] per part: gate weights. Level routing
    norm_sum        double[], -- [sum] per part: L2 norm of the output (EAN). Level activations, else null
    gated_norm_sum  double[]  -- [sum] per part: gate weight x norm (REAP's numerator). Level activations, else null
);

-- table load_span: how load moved over time, where a source counts per forward pass and keeps no trace. Imports only.
create table load_span (
    layer   integer,  -- [key]
    step    integer,  -- [key]
    span    bigint,   -- [key] number of the forward pass, or of the span of passes, in the order of the source
    tokens  bigint[]  -- [sum] per expert: selections
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

-- table expert_rank: how often each expert was first, second, ... choice, and how sure the router was. Level routing.
create table expert_rank (
    layer                 integer,  -- [key]
    step                  integer,  -- [key]
    expert                integer,  -- [key]
    domain                varchar,  -- [key]
    phase                 varchar,  -- [key]
    tokens                bigint[], -- [sum] per rank 1..k by gate weight: selections
    gate_sum              double[], -- [sum] per rank: gate weights
    logit_sum             double[], -- [sum] per rank: router logits
    confidence_tokens     bigint[], -- [sum] per eighth of [0, 1] of the softmax over the k chosen logits: selections
    confidence_logit_sum  double[]  -- [sum] per eighth: router logits
);

-- table expert_pair: sums over pairs of experts of one layer, a row per expert, an entry per other expert; none above 1024 experts.
create table expert_pair (
    layer            integer,  -- [key]
    step             integer,  -- [key]
    expert           integer,  -- [key]
    domain           varchar,  -- [key]
    phase            varchar,  -- [key]
    selections       bigint[], -- [sum] tokens that used both (its own entry: tokens that used it). Level routing
    logit_products   double[], -- [sum] product of both router logits over all tokens (Gram matrix). Level routing
    output_products  double[]  -- [sum] scalar product of both gated outputs over tokens that used both. Level activations
);

-- table score_chunk: the largest router scores of every token. Only where --router-scores asked for them.
create table score_chunk (
    layer          integer,     -- [row]
    step           integer,     -- [row]
    sequence       uinteger,    -- [row]
    start          uinteger,    -- [row] position of the first token of the chunk (at most 512 tokens)
    width          utinyint,    -- [row] m: entries per token
    low            float,       -- [row] logit = low + scores / 65535 * (high - low)
    high           float,       -- [row]
    experts        usmallint[], -- [row] the m experts with the largest logits, in descending order; 65535 = none: a logit was not finite
    scores         usmallint[], -- [row] their logits in 16 bits
    log_partition  float[]      -- [row] per token: logsumexp of all its logits; NaN where one was not finite
);

-- table router_row: the router's own weights. Level activations.
create table router_row (
    layer           integer, -- [key]
    step            integer, -- [key]
    expert          integer, -- [key]
    weights         float[], -- [max] row of the router's matrix
    bias            double,  -- [max] bias of the logit; null without
    selection_bias  double   -- [max] bias that counts for choosing only; null without
);

-- table expert_weight: norms of each expert's weights, per neuron. Level activations.
create table expert_weight (
    layer      integer, -- [key]
    step       integer, -- [key]
    expert     integer, -- [key]
    kind       varchar, -- [key]
    gate_norm  float[], -- [max] L2 norm of the neuron's gate row; null without gate
    up_norm    float[], -- [max] of its up row
    down_norm  float[]  -- [max] of its down column
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
    shifted_gated_norm_sum   double,   -- [sum] gate weight x norm x max(0, 1 - cos(r, r + y)), see moe_output (EASY-EP)
    shifted_tokens           bigint,   -- [sum] tokens that the sum before counts: those whose r was seen
    stream_square_sum        double,   -- [sum] (gate weight x norm / norm of r + y) squared, of the same tokens
    stream_gate_sum          double,   -- [sum] (gate weight / norm of r + y) squared, of the same tokens
    output_max               double,   -- [max] largest |output| over tokens and channels
    output_max_channel       integer,  -- [at output_max] its channel
    output_max_sequence      uinteger, -- [at output_max] its sequence
    output_max_position      uinteger, -- [at output_max] its position
    gated_output_max         double,   -- [max] largest gate weight x |output|
    first_routed_output_max  double,   -- [max] largest |output| over the first token of each sequence that used the expert
    input_max                double    -- [max] largest |activation| that enters down_proj
);

-- table expert_error: what narrower weights of an expert do to its output, on a sample of its tokens. Level errors.
create table expert_error (
    layer                    integer,  -- [key]
    step                     integer,  -- [key]
    expert                   integer,  -- [key]
    kind                     varchar,  -- [key]
    part                     varchar,  -- [key] whose weights are narrower: all | gate | up | down
    domain                   varchar,  -- [key] empty for single projections that are pooled over domains
    phase                    varchar,  -- [key]
    tokens                   bigint,   -- [sum] sampled tokens that went through the expert
    gated_output_square_sum  double,   -- [sum] squared L2 norm of gate weight x output, weights as they are
    gated_error_square_sum   double[], -- [sum] per width 1, ternary, 2, 3, 4, 8: squared L2 norm of gate weight x what the output changes by
    nested_error_square_sum  double[]  -- [sum] the same per width 2, 3, 4 made from 2 by binary residuals; part all, null for others
);

-- table expert_grid: what narrower widths do to the weights themselves. Level errors.
create table expert_grid (
    layer         integer,  -- [key]
    step          integer,  -- [key]
    expert        integer,  -- [key]
    kind          varchar,  -- [key]
    part          varchar,  -- [key] gate | up | down
    group_size    integer,  -- [max] input channels that share a scale; 0 = a row
    square_sum    double,   -- [max] squared Frobenius norm
    error_square  double[], -- [max] per width 1, ternary, 2, 3, 4, 8: squared Frobenius norm of what the weights change by
    outlier       double    -- [max] largest over input channels of max |w| / mean |w| (QuantMoE-Bench)
);

-- table moe_output: what the routed experts of a layer add (y) to the residual stream (r). Level activations.
create table moe_output (
    layer                integer, -- [key]
    step                 integer, -- [key]
    domain               varchar, -- [key]
    phase                varchar, -- [key]
    tokens               bigint,  -- [sum]
    output_square_sum    double,  -- [sum] squared L2 norm of y, the experts' weighted sum
    output_max           double,  -- [max] largest |y|
    residual_tokens      bigint,  -- [sum] tokens whose r was seen: what entered the norm before the block
    residual_square_sum  double,  -- [sum] squared L2 norm of r
    cosine_sum           double,  -- [sum] cos(r, r + y)
    residual_max         double   -- [max] largest |r|
);

-- table neuron_activation: per neuron, the activation a that enters down_proj. Level activations.
create table neuron_activation (
    layer               integer, -- [key]
    step                integer, -- [key]
    expert              integer, -- [key]
    kind                varchar, -- [key]
    domain              varchar, -- [key]
    phase               varchar, -- [key]
    tokens              bigint,  -- [sum]
    square_sum          float[], -- [sum] a squared
    absolute_sum        float[], -- [sum] |a|
    gated_square_sum    float[], -- [sum] (gate weight x a) squared
    gated_absolute_sum  float[], -- [sum] |gate weight x a|
    gated_absolute_max  float[]  -- [max] |gate weight x a|
);

-- table expert_vector: per channel, what enters and leaves each expert. Level activations.
create table expert_vector (
    layer             integer, -- [key]
    step              integer, -- [key]
    expert            integer, -- [key]
    kind              varchar, -- [key]
    domain            varchar, -- [key]
    phase             varchar, -- [key]
    tokens            bigint,  -- [sum]
    input_square_sum  float[], -- [sum] squared input x of the expert, over its tokens
    input_max         float[], -- [max] largest |x|
    output_sum        float[], -- [sum] output f, before the gate weight
    gated_output_sum  float[]  -- [sum] gate weight x f
);

-- table neuron_gradient: per neuron, the gradient h of the loss by a. Level gradients. The loss is summed, not averaged.
create table neuron_gradient (
    layer                  integer, -- [key]
    step                   integer, -- [key]
    expert                 integer, -- [key]
    kind                   varchar, -- [key]
    domain                 varchar, -- [key]
    phase                  varchar, -- [key]
    tokens                 bigint,  -- [sum]
    activation_square_sum  float[], -- [sum] a squared
    gradient_square_sum    float[], -- [sum] h squared; its mean x the mean of a squared is HEAPr's score
    product_sum            float[], -- [sum] a x h (Taylor)
    product_square_sum     float[]  -- [sum] (a x h) squared (empirical Fisher of the neuron's mask)
);

-- table expert_gradient: the same for whole experts. Level gradients.
create table expert_gradient (
    layer               integer, -- [key]
    step                integer, -- [key]
    expert              integer, -- [key]
    kind                varchar, -- [key]
    domain              varchar, -- [key]
    phase               varchar, -- [key]
    tokens              bigint,  -- [sum]
    product_sum         double,  -- [sum] a x h summed over neurons
    product_square_sum  double   -- [sum] its square, token by token
);

-- table loss: the model's loss on the text, next token by next token. Level gradients.
create table loss (
    domain      varchar, -- [key]
    predictions bigint,  -- [sum] tokens that were predicted
    loss_sum    double   -- [sum] cross-entropy, nats; exp(loss_sum / predictions) is the perplexity
);

-- table expert_similarity: all experts of a layer on the same sample of tokens. Level similarity; none above 1024 experts.
create table expert_similarity (
    layer        integer,  -- [key]
    step         integer,  -- [key]
    expert       integer,  -- [key]
    domain       varchar,  -- [key]
    phase        varchar,  -- [key]
    tokens       bigint,   -- [sum] sampled tokens; every expert saw each of them
    output_sum   float[],  -- [sum] per channel: output f
    cosine_sum   double[], -- [sum] per other expert: cosine of both outputs
    product_sum  double[], -- [sum] per other expert: scalar product of both outputs
    groups       bigint,   -- [sum] groups of 8 to 256 sampled tokens whose outputs were compared as sets
    group_tokens bigint,   -- [sum] tokens in these groups
    hsic_sum     double[], -- [sum] per other expert: HSIC of both outputs inside each group x its tokens, biased, linear kernel (CKA)
    unbiased_hsic_sum double[] -- [sum] per other expert: the same with the unbiased estimate (debiased CKA)
);

-- table expert_weight_similarity: how alike the weights of two experts are. Level similarity; none above 1024 experts.
create table expert_weight_similarity (
    layer           integer,  -- [key]
    step            integer,  -- [key]
    expert          integer,  -- [key]
    matrix          varchar,  -- [key] gate | up | down | all (the three behind each other)
    cosine          float[],  -- [max] per other expert: cosine of the flattened matrices, neurons in their own order; NaN without weights
    mean_cosine     float[],  -- [max] per other expert: cosine of the matrices' means over neurons
    matched_cosine  float[]   -- [max] per other expert: cosine after whole neurons were matched; NaN where not computed
);

-- table lookahead: the router of a later layer on an earlier layer's input, against what it chose. Level lookahead.
create table lookahead (
    layer       integer,  -- [key] whose experts are predicted
    step        integer,  -- [key]
    distance    integer,  -- [key] MoE layers between the input and the router, 1 = the layer before
    input       varchar,  -- [key] router (input of the earlier router) | residual (the earlier residual stream through the later norm)
    domain      varchar,  -- [key]
    phase       varchar,  -- [key]
    first       boolean,  -- [key] position 0, which is unlike all others
    tokens      bigint,   -- [sum]
    selections  bigint,   -- [sum] experts chosen
    hits        bigint[], -- [sum] of which among the k, k + 1, ... k + 8 predicted ones
    exact       bigint[], -- [sum] tokens whose whole choice was predicted, for the same numbers
    first_hits  bigint,   -- [sum] tokens whose first choice was predicted as first
    cosine_sum  double    -- [sum] cosine of what the later router was given and its real input
);

-- table attention: how much attention the first position draws. Level attention.
create table attention (
    layer     integer,  -- [key]
    domain    varchar,  -- [key]
    phase     varchar,  -- [key]
    queries   bigint,   -- [sum] tokens after the first position
    sink_sum  double[]  -- [sum] per head: attention probability of position 0
);

-- table moment: second moments of what enters the experts of a layer. Level moments.
create table moment (
    layer     integer, -- [key]
    step      integer, -- [key]
    domain    varchar, -- [key]
    phase     varchar, -- [key]
    channel   integer, -- [key] row of the matrix
    tokens    bigint,  -- [sum]
    products  float[]  -- [sum] per other channel: product of both
);

-- table residual: the residual stream after each decoder layer. Level activations.
create table residual (
    layer             integer,  -- [key]
    domain            varchar,  -- [key]
    phase             varchar,  -- [key]
    tokens            bigint,   -- [sum]
    norm_sum          double,   -- [sum] L2 norm of the hidden state
    input_cosine_sum  double,   -- [sum] cosine of what entered the layer and what left it (one minus it: block influence)
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

-- table omission: what this run cannot say, and why. Imports only.
create table omission (
    subject varchar, -- [row] trace | order | weights | logits | outputs | text | phases | checks
    reason  varchar  -- [row] one sentence
);

-- view route: the trace as (sequence, position, layer, rank, expert, weight), rank 0 = largest gate weight.
create view route as
select layer, step, sequence, start + (i // width)::uinteger as position, (i % width)::utinyint as rank,
       experts[i + 1] as expert, weights[i + 1] / 255.0 * scale as weight
from (select *, unnest(range(len(experts))) as i from route_chunk)
where experts[i + 1] <> no_expert();
