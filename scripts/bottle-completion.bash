# Completion for the driver and the tools in bash:
#
#     . scripts/bottle-completion.bash
#
# Verbs, flags and their wording come from each tool's --help, agents from the
# manifest in the working folder, ids from bottle-vm ls: nothing here to keep up.
# shellcheck shell=bash

# the words of a --help: verbs stand two spaces in below "verbs:", flags begin with a dash
_bottle_verbs() { "$@" --help 2>/dev/null | sed -n '/^verbs:/,/^$/s/^  \([a-z]\{1,\}\) .*/\1/p'; }
_bottle_flags() { "$@" --help 2>/dev/null | sed -n '/^flags:/,$s/^  \(--\{0,1\}[a-zA-Z-]\{1,\}\) .*/\1/p'; }
_bottle_driver_verbs() { bottle --help 2>/dev/null | sed -n 's/^[u ][sage: ]* bottle \([a-z]\{1,\}\) .*/\1/p'; }
_bottle_agents() { bottle-plan check -m "${BOTTLE_MANIFEST:-bottle.json}" 2>/dev/null | sed 's/.*agents: //; s/,//g'; }
_bottle_ids() { bottle-vm ls 2>/dev/null | sed -n 's/^{"id":"\([a-z0-9-]*\)".*/\1/p'; }

_bottle() {
	local cur=${COMP_WORDS[COMP_CWORD]} tool=${COMP_WORDS[0]##*/} verb='' words='' i
	for ((i = 1; i < COMP_CWORD; i++)); do
		[[ ${COMP_WORDS[i]} == -- ]] && { COMPREPLY=(); return; } # the guest's command
		[[ $verb || ${COMP_WORDS[i]} == -* ]] || verb=${COMP_WORDS[i]}
	done
	[[ ${COMP_WORDS[COMP_CWORD - 1]} == --bottle ]] && verb=--bottle
	case $tool:$verb:$cur in
	*:--bottle:*) words=$(_bottle_ids) ;;
	bottle::*) words=$(_bottle_driver_verbs) ;;
	bottle:run:* | bottle:start:*) words="$(_bottle_agents) --" ;;
	bottle:plan:*) words="$(_bottle_agents) --all --hash --pretty" ;;
	bottle:gc:*) words=$(_bottle_flags bottle-gc) ;;
	bottle:ls:*) words=--pretty ;;
	bottle:*) words="$(_bottle_ids) --" ;;
	*::-*) words=$(_bottle_flags "$tool") ;;
	bottle-plan::*) words="$(_bottle_agents) $(_bottle_verbs "$tool")" ;;
	bottle-probe::*) words="$(_bottle_verbs "$tool") $(_bottle_ids)" ;;
	*::*) words=$(_bottle_verbs "$tool") ;;
	*:*:-*) words="$(_bottle_flags "$tool" "$verb")" ;;
	bottle-vm:cp:*)
		words=$(_bottle_ids | sed 's/$/:/')
		compopt -o nospace 2>/dev/null # the path comes right behind the colon
		;;
	bottle-vm:*) words="$(_bottle_ids) --" ;;
	bottle-egress:log:* | bottle-egress:learn:* | bottle-egress:replay:*) words=$(_bottle_ids) ;;
	bottle-plan:*) words=$(_bottle_agents) ;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -o default -F _bottle bottle bottle-plan bottle-egress bottle-pack bottle-vm bottle-gc bottle-probe
