package orphan

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/plan"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

const boot = "b00t"

func proc(pid int) plan.Process {
	return plan.Process{PID: pid, StartTime: uint64(pid * 10), BootID: boot}
}

func ref(p plan.Process) *plan.Process { return &p }

// live is a bottle in order: everything that its record names is there.
func live() (Facts, *Bottle) {
	f := Facts{Now: now, MinAge: time.Minute, UID: 1000, BootID: boot, Seen: map[int]plan.Process{}}
	for pid := 1; pid <= 6; pid++ {
		f.Seen[pid] = proc(pid)
	}
	f.Bottles = []Bottle{{
		ID: "dev-0123abcd", Dir: "/s/dev-0123abcd", Inode: 7, UID: 1000, Changed: now.Add(-time.Hour), RunDir: "/r/0123abcd",
		Record: &Record{UID: 1000, Creator: proc(1), Owner: ref(proc(2)), Keeper: ref(proc(3)), PlanSHA256: "sha256:p",
			Processes: []Child{{"gate", proc(4)}, {"sandbox", proc(5)}, {"machine", proc(6)}}},
	}}
	f.RunDirs = []RunDir{{Path: "/r/0123abcd", UID: 1000, Changed: now.Add(-time.Hour)}}
	f.Machines = []VM{{Name: "dev-0123abcd", State: "running"}}
	return f, &f.Bottles[0]
}

func TestDecide(t *testing.T) {
	all := "process:keeper process:gate sandbox:sandbox machine:machine socket folder"
	children := "process:gate sandbox:sandbox machine:machine socket folder"
	for _, tc := range []struct {
		name     string
		change   func(*Facts, *Bottle)
		want     string
		evidence string // in the last orphan
	}{
		{"live", func(f *Facts, b *Bottle) {}, "", ""},
		{"live without an owner", func(f *Facts, b *Bottle) { b.Record.Owner = nil; delete(f.Seen, 2) }, "", ""},
		{"live, and what made it is gone", func(f *Facts, b *Bottle) { delete(f.Seen, 1) }, "", ""},
		{"live, a child is gone", func(f *Facts, b *Bottle) { delete(f.Seen, 4) }, "", ""},
		{"owner gone", func(f *Facts, b *Bottle) { delete(f.Seen, 2) }, all, "owner pid 2 (start time 20, boot b00t) is dead"},
		{"owner gone, being taken down", func(f *Facts, b *Bottle) {
			delete(f.Seen, 2)
			b.Record.Stopping, b.Changed = true, now.Add(-time.Second)
		}, "", ""},
		{"owner gone, taken down for too long", func(f *Facts, b *Bottle) {
			delete(f.Seen, 2)
			b.Record.Stopping = true
		}, all, "owner"},
		{"owner's pid used again", func(f *Facts, b *Bottle) {
			f.Seen[2] = plan.Process{PID: 2, StartTime: 99, BootID: boot}
		}, all, "its pid is another process's now, started at 99"},
		{"keeper dead", func(f *Facts, b *Bottle) { delete(f.Seen, 3) }, children, "keeper pid 3 (start time 30, boot b00t) is dead"},
		{"keeper's pid used again", func(f *Facts, b *Bottle) {
			f.Seen[3] = plan.Process{PID: 3, StartTime: 31, BootID: boot}
		}, children, "another process's now"},
		{"keeper dead, a child's pid used again", func(f *Facts, b *Bottle) {
			delete(f.Seen, 3)
			f.Seen[4] = plan.Process{PID: 4, StartTime: 41, BootID: boot}
		}, "sandbox:sandbox machine:machine socket folder", "plan sha256:p"},
		{"keeper dead, somebody removes it", func(f *Facts, b *Bottle) { delete(f.Seen, 3); b.Locked = true }, "", ""},
		{"keeper dead, still being made", func(f *Facts, b *Bottle) { delete(f.Seen, 3); b.Record.Starting = true }, "", ""},
		{"keeper dead, made no more", func(f *Facts, b *Bottle) {
			delete(f.Seen, 3)
			delete(f.Seen, 1)
			b.Record.Starting = true
		}, children, "keeper"},
		{"after a reboot", func(f *Facts, b *Bottle) { f.BootID = "n3w" }, "socket folder", "keeper pid 3 (start time 30, boot b00t) is from before the last boot"},
		{"being born", func(f *Facts, b *Bottle) { b.Record.Starting, b.Record.Keeper = true, nil }, "", ""},
		{"born dead", func(f *Facts, b *Bottle) {
			b.Record.Starting, b.Record.Keeper, b.Record.Processes = true, nil, nil
			delete(f.Seen, 1)
		}, "socket folder", "what made it, pid 1"},
		{"never had a keeper", func(f *Facts, b *Bottle) { b.Record.Keeper, b.Record.Processes = nil, nil }, "socket folder", "is not being made"},
		{"another user's folder", func(f *Facts, b *Bottle) { b.UID = 1; delete(f.Seen, 3) }, "", ""},
		{"another user's record", func(f *Facts, b *Bottle) { b.Record.UID = 1; delete(f.Seen, 3) }, "", ""},
		{"no record, young", func(f *Facts, b *Bottle) { b.Record, b.Changed = nil, now.Add(-59*time.Second) }, "", ""},
		{"no record, from the future", func(f *Facts, b *Bottle) { b.Record, b.Changed = nil, now.Add(time.Hour) }, "", ""},
		{"no record, old", func(f *Facts, b *Bottle) { b.Record, b.NoRecord = nil, "no record" }, "socket folder", "no record"},
		{"no record, locked", func(f *Facts, b *Bottle) { b.Record, b.Locked = nil, true }, "", ""},
		{"mounts", func(f *Facts, b *Bottle) {
			delete(f.Seen, 3)
			b.Record.Processes, b.RunDir, b.Mounts = nil, "", []string{"/s/dev-0123abcd/null-netns"}
		}, "folder", "mounted below it: /s/dev-0123abcd/null-netns"},
		{"a process twice in the record", func(f *Facts, b *Bottle) {
			delete(f.Seen, 2)
			b.Record.Processes = []Child{{"keeper", proc(3)}, {"proxy", proc(4)}, {"proxy", proc(4)}}
		}, "process:keeper process:proxy socket folder", ""},
		{"sockets of nobody", func(f *Facts, b *Bottle) {
			old := now.Add(-time.Hour)
			f.RunDirs = append(f.RunDirs,
				RunDir{Path: "/r/11111111", UID: 1000, Changed: old},
				RunDir{Path: "/r/22222222", UID: 1000, Changed: old, InUse: true},
				RunDir{Path: "/r/33333333", UID: 1000, Changed: now},
				RunDir{Path: "/r/44444444", UID: 0, Changed: old})
		}, "socket", "nobody answers"},
		{"machines", func(f *Facts, b *Bottle) {
			f.Machines = append(f.Machines,
				VM{Name: "lost-11111111", State: "stopped"},
				VM{Name: "other-22222222"},
				VM{Name: "young-33333333", Created: now.Add(-time.Second)},
				VM{Name: "not ours"})
			f.RunDirs = append(f.RunDirs, RunDir{Path: "/r/22222222", UID: 1000, InUse: true})
		}, "machine", "state stopped"},
		{"a machine of a boot check", func(f *Facts, b *Bottle) {
			waits, dead := proc(3), proc(99)
			f.Machines = append(f.Machines, VM{Name: "bottle-check-11111111", State: "created", Maker: &waits},
				VM{Name: "bottle-check-22222222", State: "running", Maker: &dead})
		}, "machine", "what made it, pid 99"},
		{"cache", func(f *Facts, b *Bottle) { f.Cache = []string{"/c/tmp-1"} }, "cache", "its lock is free"},
		{"packs for nobody", func(f *Facts, b *Bottle) {
			f.Seen[7] = proc(7)
			f.Packers = []Packer{{proc(8), proc(7), ""}, {proc(9), proc(7), "/vms/1"}, {proc(10), proc(66), ""}, {proc(11), proc(66), "/vms/2"}}
		}, "process:packer machine:packer", "which is dead"},
		{"at once", func(f *Facts, b *Bottle) { f.MinAge, b.Record, b.Changed = 0, nil, now }, "socket folder", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, b := live()
			tc.change(&f, b)
			var got []string
			orphans := Decide(f)
			for _, o := range orphans {
				s := o.Kind
				if o.Process != nil {
					s += ":" + o.Role
				}
				got = append(got, s)
				if o.Format != plan.FormatVersion || len(o.Evidence) == 0 || o.Action == "" || o.Path == "" && o.Process == nil && o.ID == "" {
					t.Errorf("incomplete: %+v", o)
				}
			}
			if strings.Join(got, " ") != tc.want {
				t.Fatalf("got %q, want %q", got, tc.want)
			}
			if tc.evidence != "" && !strings.Contains(strings.Join(orphans[len(orphans)-1].Evidence, "\n"), tc.evidence) {
				t.Errorf("evidence %q lacks %q", orphans[len(orphans)-1].Evidence, tc.evidence)
			}
		})
	}
}

// The order is that of removal: nothing goes before what depends on it.
func TestOrder(t *testing.T) {
	f, _ := live()
	delete(f.Seen, 2)
	f.Cache = []string{"/c"}
	var kinds []string
	for _, o := range Decide(f) {
		kinds = append(kinds, o.Kind)
	}
	if want := []string{Process, Process, Sandbox, Machine, Socket, Folder, Cache}; !slices.Equal(kinds, want) {
		t.Errorf("%q", kinds)
	}
}

// A prepared machine is kept while it is used, and for a while after.
func TestPreparedMachines(t *testing.T) {
	for _, tc := range []struct {
		name     string
		change   func(*Facts, *Prepared)
		want     string
		evidence string
	}{
		{"in use", func(f *Facts, b *Prepared) {}, "", ""},
		{"used an hour ago", func(f *Facts, b *Prepared) { b.Copies = nil }, "", ""},
		{"used a day ago", func(f *Facts, b *Prepared) { b.Copies, b.UsedAt = nil, now.Add(-25*time.Hour) }, "base", "none was made since 2026-01-01T02:04:05Z"},
		{"old and in use", func(f *Facts, b *Prepared) { b.UsedAt = now.Add(-25 * time.Hour) }, "", ""},
		{"old and locked", func(f *Facts, b *Prepared) { b.Copies, b.UsedAt, b.Locked = nil, now.Add(-25*time.Hour), true }, "", ""},
		{"dead", func(f *Facts, b *Prepared) { b.Copies, b.Alive = nil, false }, "base", "monitor is dead"},
		{"dead, being made", func(f *Facts, b *Prepared) { b.Copies, b.Alive, b.Locked = nil, false, true }, "", ""},
		{"dead and young", func(f *Facts, b *Prepared) { b.Copies, b.Alive, b.Changed = nil, false, now }, "", ""},
		{"no record", func(f *Facts, b *Prepared) { b.Copies, b.Name = nil, "" }, "base socket machine", "no record"},
		{"another user's", func(f *Facts, b *Prepared) { b.Copies, b.Alive, b.UID = nil, false, 7 }, "", ""},
		{"its machine without it", func(f *Facts, b *Prepared) { f.Bases = nil; f.RunDirs = nil }, "machine", "no prepared machine"},
		{"another state folder's", func(f *Facts, b *Prepared) { f.Bases = nil; f.RunDirs[0].InUse = true }, "", ""},
	} {
		f := Facts{Now: now, MinAge: time.Minute, UID: 1000, BootID: boot, BaseLife: 24 * time.Hour,
			Bases: []Prepared{{Name: BasePrefix + "0123456789ab", Dir: "/s/warm/0123456789ab", UID: 1000, Alive: true,
				Changed: now.Add(-time.Hour), UsedAt: now.Add(-time.Hour), Copies: []string{"dev-0123abcd"}}},
			Machines: []VM{{Name: BasePrefix + "0123456789ab", State: "running"}},
			RunDirs:  []RunDir{{Path: "/r/w0123456789ab", UID: 1000, Changed: now.Add(-time.Hour)}},
		}
		tc.change(&f, firstOf(&f))
		var kinds []string
		evidence := ""
		for _, o := range Decide(f) {
			kinds = append(kinds, o.Kind)
			evidence += strings.Join(o.Evidence, "; ")
		}
		slices.Sort(kinds)
		want := strings.Fields(tc.want)
		slices.Sort(want)
		if !slices.Equal(kinds, want) || !strings.Contains(evidence, tc.evidence) {
			t.Errorf("%s: %v (%s), want %v (%s)", tc.name, kinds, evidence, want, tc.evidence)
		}
	}
}

func firstOf(f *Facts) *Prepared { return &f.Bases[0] }
