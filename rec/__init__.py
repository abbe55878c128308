"""Distributed training of multitask rankers on large sparse features.

The map, in the order in which data flows; a module imports only from those above it. B rows, F dense columns, D embedding
columns, d network width, T tasks, N experts, H expert width.

    schema           YAML of a data set -> DataConfig: columns, tables, tasks, domains
    storage          path or URI -> a place in a folder or an object store, and what its failures mean

  get data
    population       seed -> users, queries, listings and shops of the simulated market
    market           seed -> chunks of simulated impressions with known probabilities
    simulate         market -> Parquet
    past             rows in time order -> what was known strictly before each
    raw              raw CSV files -> checked columns, or an error with file, line and value
    kuairand         raw files of KuaiRand-Pure -> impressions with histories and counters
    census           raw files of Census-Income and Adult -> people
    prepare          a public data set's raw files -> Parquet

  read
    hashing          ids of any kind -> uint64, the same in serving
    columns          one Arrow column -> checked numpy values
    expected         schemas of files -> what is wrong with their columns, and with one another
    features         columns -> Batch: KeyedJaggedTensor, dense [B, F], labels and weights [B, T], domain_id and group_id [B]
    data             Parquet, seed, step -> this rank's Batch

  model, for one device
    embeddings       KeyedJaggedTensor -> pooled [B, D] a feature, histories [B, L, D], weights of the linear part
    histories        histories [B, L, D] and candidate [B, D] -> [B, D]
    inputs           these and dense columns, side by side -> [B, d]
    linear           ids' weights and dense columns -> linear features [B, l], logits [B, T]
    interaction      [B, d] -> crosses [B, d]; embeddings -> a factorisation machine's logits [B, T]
    stacked          N networks of one shape as batched products
    mixtures         what experts are made of: stacks, gates
    task_networks    [B, d] -> mixtures [B, T, H] of networks that each belong to one task
    domain_experts   [B, d] and domain_id [B] -> mixtures [B, T, H]
    experts          [B, d] -> mixtures [B, T, H], gate_weights [B, T, N]
    towers           [B, T, H], or with an item's vector [B, r] -> a logit a tower
    funnel           towers' logits -> logits [B, T]: products along a funnel, corrections for sampling
    model            Batch -> logits [B, T]
    losses           logits, labels, weights [B, T] -> one loss

  spread over ranks
    interrupts       SIGTERM -> a wish to stop, and an exit code of its own
    distributed      torchrun's environment -> process group, and a clean end
    weighting        tasks' losses and gradients -> one loss, agreed by all ranks
    optim            parameters -> fused sparse and dense optimizers, one schedule
    sharding         model -> DistributedModelParallel: a plan, filled tables

  measure and keep
    curves           scores, labels -> AUC, average precision, ECE
    intervals        scores, labels of runs -> intervals of their differences
    paired           predictions of runs -> the same rows, side by side
    metrics          logits over ranks -> metrics by task and domain
    health           gate weights, expert outputs over ranks -> who mixes which experts, and advice
    fusion           probabilities of several tasks -> one score to rank by
    predictions      batches -> logits of every row, as Parquet too
    platt            logits, labels over ranks -> slopes and offsets by domain
    isotonic         logits, labels over ranks -> monotone curves by domain
    calibration      these -> calibrators, kept with a checkpoint
    reliability      logits, labels over ranks -> bins of predictions and rates
    tensor_files     tensors over ranks <-> files with sums
    checkpoint       these, in the background, whole or invisible
    logs             events -> metrics.jsonl, TensorBoard, console
    rng              generators of random numbers <-> tensors
    guard            losses over ranks -> learn, skip or stop, and who is to blame
    window           steps -> mean losses, rows a second, where the time went on each rank
    watch            signs of life of all ranks -> who stands still, and its stacks
    evaluation       batches of a split -> metrics over ranks
    train_state      all that changes in training <-> tensors
    trainer          all of these -> a trained model
    config           conf/ and overrides -> Config
    warm_start       another run's checkpoint -> the weights that a new run starts from
    serving          network, calibrators -> a program on plain tensors, and the description of its inputs
    two_towers       the two sides of it, where an item has a vector of its own
    widen            two Configs -> the width that gives one the other's number of weights

  run (python -m rec.<name>)
    select           Parquet -> the same, of chosen rows
    train            Config -> run folder
    sweep            swept overrides -> one torchrun job each
    evaluate         run folder -> metrics of a split
    baseline         Parquet -> LightGBM's metrics on the same columns
    predict          run folder -> predictions of a split
    calibrate        run folder -> its calibrators
    export           run folder -> what is served
    items            run folder -> vectors of all items, ahead of time
    report           run folders -> a table
    compare          run folders -> differences, within noise or not
    fuse             predictions of runs -> what a fusion of tasks buys and costs
    worlds           seed -> endless batches of a small world with known probabilities
    id_world         seed -> batches with ids, histories and linear features
    domain_world     seed -> batches of unequal domains, labelled by a teacher
    arms             a network in a world -> what it comes to
    claims           what studies of the MMoE paper and of Etsy compare
    claims_features  of Taobao and AppS
    claims_domains   of MTMD
    study            a claim -> a table over worlds
    findings         what was looked at -> a report
    sample           a split -> some of its rows, and all that is wrong with them
    checkup          Config, data, machine -> findings and remedies
    doctor           this machine -> findings and remedies
"""
