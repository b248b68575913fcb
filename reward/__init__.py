"""What is good: preferences, the models that learn them, and the judges that state them.

A package of its own: it imports nothing from `pe_rlhf`, and importing `reward` imports nothing heavy.

| module        | what it holds                                                                        |
|---------------|--------------------------------------------------------------------------------------|
| `records`     | `PreferenceRecord`, and the formats it is read from (TRL plain and chat, hh-rlhf)    |
| `losses`      | `pairwise_loss`: Bradley–Terry with margin, label smoothing and centering            |
| `head`        | `ScalarHead`: one fp32 number per position of the backbone's hidden states           |
| `calibration` | reliability table, expected calibration error, interval of an accuracy               |
| `winrate`     | `win_rate`: a win rate with an interval that knows ties and repeated prompts; tests  |
| `length_control` | the length-controlled win rate of AlpacaEval 2                                    |
| `agreement`   | accuracy and kappa of a judge against people                                         |
| `verdicts`, `summary`  | `Verdict` and files of them, and from them the result of each candidate     |
| `judges`      | a package: the protocol, and judges that are functions, rewards or chat models       |
| `asking`      | many pairs through a judge: both orders, several at once, each answer on disk        |
| `pairs`       | what the scores of preference pairs say about a reward model                         |
| `scores`      | ready score functions: `vader` (sentiment), `length` (a control for length bias)     |
| `settings`, `advance`, `row_files` | the base of all settings; progress; files of rows with named columns    |
| `errors`      | `InputError`: a mistake in what the user gave; `JudgeError`: a judge that failed      |
"""
